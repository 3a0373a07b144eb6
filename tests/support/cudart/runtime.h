// How a test sets up the fake runtime and asks what happened.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

struct Settings {
  int64_t total = 1 << 30;  // bytes of the device
  int64_t others = 0;       // of these taken by other programs
  bool faults = true;       // concurrentManagedAccess
  bool deferred = false;    // work waits until somebody synchronises, and then runs in any order that streams allow
  uint32_t seed = 0;        // of that order
};

void reset(const Settings& settings);
void set_others(int64_t bytes);
void fail(const std::string& function, int nth, int code);  // the nth call from now on; 719 is for good
std::vector<std::string> calls();                           // every call, with what matters of its arguments
std::vector<std::string> wrongs();                          // what a real device would not have put up with
std::map<std::string, int64_t> alive();                     // blocks, streams and events not given back
int64_t resident(uintptr_t address, int64_t bytes);         // managed bytes of a range on the device
int64_t faults();                                           // pages of managed memory that a kernel had to fetch
uintptr_t new_stream();
// A kernel that makes every byte b of the ranges 3 b + 1.
void kernel(uintptr_t stream, const std::vector<std::tuple<uintptr_t, int64_t>>& ranges);
void finish();  // all that is enqueued
