// Which instruction-set tiers exist, which can run here, and which one runs.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace mbv2 {

enum class Tier : int { portable, avx2, avx512, avx512bf16x3, avx512amx, avx512fp16 };

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

// The one that multiplies bf16. It runs for bf16 images, in inference, in place of the fastest fp32 tier.
const TierStatus& bf16_tier();

// The one that computes in fp16. It is never the active tier: weights are packed for it on demand, for float16 images.
const TierStatus& fp16_tier();

// All of them: tiers(), then bf16_tier() and fp16_tier().
const std::vector<const TierStatus*>& all_tiers();

const TierStatus& status_of(Tier tier);

// The one of all_tiers() called `name`. Throws std::invalid_argument where there is none, with the names that there
// are, or it cannot run here, with the reason.
const TierStatus& runnable_tier(const std::string& name);

// The fastest fp32 tier that can run and does not exceed the cap.
Tier active_tier();

// The tier for bf16 images in inference: bf16_tier() if it can run and the cap is no fp32 tier, else active_tier().
Tier active_bf16_tier();

// Caps the tiers at the one called `name`, any but fp16_tier(); null lifts the cap, and bf16_tier() is none. Throws
// std::invalid_argument on another name.
void set_max_isa(const char* name);
const char* max_isa();

// Calls of the block's kernel by tier, so that tests and summaries can tell what really ran.
void count_call(Tier tier);
uint64_t call_count(Tier tier);
void reset_call_counts();

}  // namespace mbv2
