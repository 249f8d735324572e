# Sets HALFBYTE_COMMIT: the commit being built, marked when the tree differs from it, or "unknown" outside a clone.
set(HALFBYTE_COMMIT "unknown")
find_package(Git QUIET)
if(Git_FOUND AND EXISTS ${PROJECT_SOURCE_DIR}/.git)
  execute_process(
    COMMAND ${GIT_EXECUTABLE} describe --always --dirty --abbrev=12 --exclude *
    WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
    RESULT_VARIABLE git_status OUTPUT_VARIABLE git_commit ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(git_status EQUAL 0 AND git_commit)
    set(HALFBYTE_COMMIT "${git_commit}")
  endif()
endif()
message(STATUS "halfbyte ${HALFBYTE_VERSION}, commit ${HALFBYTE_COMMIT}")
