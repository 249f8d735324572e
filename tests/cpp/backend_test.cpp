// Choosing a backend: by name, by the environment, and what is said about names that do not exist.
#include "backend.h"

#include <cstdlib>

#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

TEST(Backend, ScalarAndReferenceAlwaysExist) {
  const std::vector<std::string> usable = usable_backends();
  EXPECT_NE(std::find(usable.begin(), usable.end(), "scalar"), usable.end());
  EXPECT_EQ(usable.back(), "reference");  // best first, and the reference is never chosen by itself
  for (const std::string& name : usable) {
    UseBackend use(name);
    EXPECT_EQ(backend(), name);
    EXPECT_LE(current_backend().rows, kMaxRows);
    EXPECT_GE(current_backend().rows, 1);
  }
}

TEST(Backend, TheListIsThatOfTheTable) {
  const std::vector<BackendInfo> list = backends();
  for (size_t i = 0; i < list.size(); i++) EXPECT_EQ(list[i].name, backend_at((int)i)->name);
  EXPECT_EQ(backend_at((int)list.size()), nullptr);
  EXPECT_EQ(backend_at(-1), nullptr);
}

TEST(Backend, AnUnknownNameListsTheUsableOnes) {
  const std::string before = backend();
  for (const char* name : {"", "sse2", "AVX2", "avx512 "}) {
    const Status status = set_backend(name);
    EXPECT_EQ(status.code(), Code::bad_argument);
    EXPECT_NE(status.message().find(std::string("'").append(name).append("'")), std::string::npos) << status.message();
    for (const std::string& usable : usable_backends())
      EXPECT_NE(status.message().find(usable), std::string::npos) << status.message();
    EXPECT_EQ(backend(), before);
  }
}

// The variable is read once, at the first use: each look needs a process of its own.
int exits_with_backend(const char* wanted) {
  setenv("HALFBYTE_BACKEND", wanted, 1);
  const std::vector<std::string> usable = usable_backends();
  const bool known = std::find(usable.begin(), usable.end(), wanted) != usable.end();
  return backend() == (known ? wanted : usable.front()) ? 0 : 1;
}

TEST(BackendDeathTest, TheEnvironmentChooses) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // starts the program anew, so that nothing has been chosen yet
  for (const char* name : {"scalar", "reference", "no-such-backend"})
    EXPECT_EXIT(std::exit(exits_with_backend(name)), ::testing::ExitedWithCode(0), "") << name;
}

TEST(Backend, VersionAndFeatures) {
  EXPECT_NE(std::string(version()), "");
  EXPECT_NE(std::string(commit()), "");
  for (const std::string& feature : cpu_features()) EXPECT_FALSE(feature.empty());
}

}  // namespace
}  // namespace halfbyte
