/* What tests may choose about the device that the emulated library pretends to be; also for ctypes. */
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

/* 132 multiprocessors with 227 KB of shared memory a thread block, as an H100, unless told otherwise. */
void halfbyte_emulator_device(int multiprocessors, int shared_bytes);
/* Order of threads and thread blocks: 0 as numbered, 1 in reverse, else shuffled with this seed. Negative, as it is
 * from the start: each launch has another. */
void halfbyte_emulator_schedule(int schedule);
/* A mutation: the barrier, exchange, product or wait at this line of the file of that name does nothing. line 0: none.
 */
void halfbyte_emulator_leave_out(const char* file, int line);

#ifdef __cplusplus
}
#endif
