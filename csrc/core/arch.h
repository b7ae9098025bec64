// Which instruction-set tiers exist, which can run here, and which one runs.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace mbv2 {

enum class Tier : int { portable, avx2, avx512, avx512fp16 };

struct TierStatus {
  Tier tier;
  const char* name;
  const char* features;  // what it is compiled with, separated by spaces
  bool compiled;         // this build has it
  bool runnable;         // ... and the CPU and the operating system offer its features
  std::string reason;    // why it cannot run; empty when it can
};

// What the CPU has and the operating system lets a program use. Empty on other machines than x86.
const std::vector<std::pair<std::string, bool>>& cpu_features();

// Every tier that computes in fp32, fastest first.
const std::vector<TierStatus>& tiers();

// The one that computes in fp16. It is never the active tier: weights are packed for it on demand, for float16 images.
const TierStatus& fp16_tier();

// The fp32 tier called `name`; throws std::invalid_argument, which names the tiers there are.
const TierStatus& find_tier(const std::string& name);

// The fastest tier that can run and does not exceed the cap.
Tier active_tier();

// Caps active_tier() at the tier called `name`; null lifts the cap. Throws std::invalid_argument on an unknown name.
void set_max_isa(const char* name);
const char* max_isa();

// Calls of the block's kernel by tier, so that tests and summaries can tell what really ran.
void count_call(Tier tier);
uint64_t call_count(Tier tier);
void reset_call_counts();

}  // namespace mbv2
