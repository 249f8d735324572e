// What only an emulator can be asked: other devices, orders of threads, and that it notices what is wrong.
#include <gtest/gtest.h>
