#include "arch.h"

#include <algorithm>
#include <atomic>
#include <sstream>
#include <stdexcept>

#include "block.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mbv2 {
namespace {

using Features = std::vector<std::pair<std::string, bool>>;

#if defined(__x86_64__) || defined(__i386__)

// A CPU may have registers that the operating system does not save when it switches tasks. XCR0 says which it saves.
constexpr uint64_t kNoState = 0, kYmm = 0x6, kZmm = 0xe6, kAmx = 0x60000;

enum Register { eax, ebx, ecx, edx };

struct FeatureBit {
  const char* name;  // as in the compiler's -m<name>
  unsigned leaf, subleaf;
  Register reg;
  int bit;
  uint64_t state;
};

// Intel SDM volume 2, CPUID; AMD's bits are the same. Those that no tier needs are reported.
constexpr FeatureBit kFeatureBits[] = {
    {"avx512f", 7, 0, ebx, 16, kZmm},    {"avx512bw", 7, 0, ebx, 30, kZmm},   {"avx512dq", 7, 0, ebx, 17, kZmm},
    {"avx512vl", 7, 0, ebx, 31, kZmm},   {"avx2", 7, 0, ebx, 5, kYmm},        {"avx", 1, 0, ecx, 28, kYmm},
    {"fma", 1, 0, ecx, 12, kYmm},        {"f16c", 1, 0, ecx, 29, kYmm},       {"sse4.2", 1, 0, ecx, 20, kNoState},
    {"popcnt", 1, 0, ecx, 23, kNoState}, {"avxvnni", 7, 1, eax, 4, kYmm},     {"avx512vnni", 7, 0, ecx, 11, kZmm},
    {"avx512bf16", 7, 1, eax, 5, kZmm},  {"avx512fp16", 7, 0, edx, 23, kZmm}, {"amx-tile", 7, 0, edx, 24, kAmx},
    {"amx-bf16", 7, 0, edx, 22, kAmx},   {"amx-int8", 7, 0, edx, 25, kAmx},
};

uint64_t saved_state() {
  unsigned regs[4] = {};
  if (!__get_cpuid(1, &regs[eax], &regs[ebx], &regs[ecx], &regs[edx])) return 0;
  if (!(regs[ecx] >> 27 & 1)) return 0;  // OSXSAVE: without it XGETBV is an illegal instruction
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // the intrinsic would want -mxsave
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux saves the tiles of AMX, 8 KB, for processes that have asked it to.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  uint64_t saved = saved_state();
  if ((saved & kAmx) && !may_use_tiles()) saved &= ~kAmx;
  Features found;
  for (const FeatureBit& f : kFeatureBits) {
    unsigned regs[4] = {};
    const bool known = __get_cpuid_count(f.leaf, f.subleaf, &regs[eax], &regs[ebx], &regs[ecx], &regs[edx]);
    found.emplace_back(f.name, known && (regs[f.reg] >> f.bit & 1) && (saved & f.state) == f.state);
  }
  return found;
}

#else

Features detect() { return {}; }

#endif

bool has_feature(const std::string& name) {
  for (const auto& feature : cpu_features())
    if (feature.first == name) return feature.second;
  return false;
}

TierStatus examine(Tier tier, const char* name, const char* features) {
  std::istringstream names(features);
  std::string flags, missing;
  for (std::string feature; names >> feature;) {
    flags += " -m" + feature;
    if (!has_feature(feature)) missing += " " + feature;
  }
  TierStatus status{tier, name, features, tier_kernels(tier) != nullptr, false, ""};
  if (!status.compiled) {
    status.reason = "not built: the compiler lacks one of" + flags;
  } else if (!missing.empty()) {
    status.reason = "the CPU or the operating system lacks" + missing;
  }
  status.runnable = status.reason.empty();
  return status;
}

const TierStatus* fastest(const TierStatus* cap) {
  if (cap == &bf16_tier()) cap = nullptr;  // faster than all of these
  for (const TierStatus& status : tiers())
    if (status.runnable && (!cap || &status >= cap)) return &status;
  return nullptr;  // never: the list ends with a tier that needs nothing
}

const TierStatus* fastest_for_bf16(const TierStatus* cap) {
  const bool capped = cap && cap != &bf16_tier();
  return bf16_tier().runnable && !capped ? &bf16_tier() : fastest(cap);
}

std::atomic<const TierStatus*> cap{nullptr};

std::atomic<const TierStatus*>& active() {
  static std::atomic<const TierStatus*> status{fastest(nullptr)};
  return status;
}

std::atomic<const TierStatus*>& active_for_bf16() {
  static std::atomic<const TierStatus*> status{fastest_for_bf16(nullptr)};
  return status;
}

std::atomic<uint64_t>& counter(Tier tier) {
  static std::vector<std::atomic<uint64_t>> counters(all_tiers().size());
  return counters[static_cast<size_t>(tier)];
}

const TierStatus& find_tier(const std::vector<const TierStatus*>& list, const std::string& name) {
  std::string names;
  for (const TierStatus* status : list) {
    if (name == status->name) return *status;
    names += (names.empty() ? "" : ", ") + std::string(status->name);
  }
  throw std::invalid_argument("unknown instruction-set tier '" + name + "', expected one of " + names);
}

const TierStatus& find_cap(const std::string& name) {
  std::vector<const TierStatus*> caps = all_tiers();
  caps.erase(std::find(caps.begin(), caps.end(), &fp16_tier()));
  return find_tier(caps, name);
}

}  // namespace

const Features& cpu_features() {
  static const Features features = detect();
  return features;
}

const std::vector<TierStatus>& tiers() {
  static const std::vector<TierStatus> list = {
#define MBV2_TIER(tier, features) examine(Tier::tier, #tier, features),
#define MBV2_BF16_TIER(...)
#define MBV2_FP16_TIER(...)
#include "kernels.inc"
#undef MBV2_TIER
#undef MBV2_BF16_TIER
#undef MBV2_FP16_TIER
  };
  return list;
}

const TierStatus& bf16_tier() {
  static const TierStatus status =
#define MBV2_TIER(...)
#define MBV2_BF16_TIER(tier, features) examine(Tier::tier, #tier, features);
#define MBV2_FP16_TIER(...)
#include "kernels.inc"
#undef MBV2_TIER
#undef MBV2_BF16_TIER
#undef MBV2_FP16_TIER
      return status;
}

const TierStatus& fp16_tier() {
  static const TierStatus status =
#define MBV2_TIER(...)
#define MBV2_BF16_TIER(...)
#define MBV2_FP16_TIER(tier, features) examine(Tier::tier, #tier, features);
#include "kernels.inc"
#undef MBV2_TIER
#undef MBV2_BF16_TIER
#undef MBV2_FP16_TIER
      return status;
}

const std::vector<const TierStatus*>& all_tiers() {
  static const std::vector<const TierStatus*> list = [] {
    std::vector<const TierStatus*> all;
    for (const TierStatus& status : tiers()) all.push_back(&status);
    all.push_back(&bf16_tier());
    all.push_back(&fp16_tier());
    return all;
  }();
  return list;
}

const TierStatus& status_of(Tier tier) {
  for (const TierStatus* status : all_tiers())
    if (status->tier == tier) return *status;
  throw std::logic_error("a tier that is not in the list of tiers");
}

const TierStatus& runnable_tier(const std::string& name) {
  const TierStatus& status = find_tier(all_tiers(), name);
  if (!status.runnable) throw std::invalid_argument("tier '" + name + "' cannot run here: " + status.reason);
  return status;
}

Tier active_tier() { return active().load(std::memory_order_relaxed)->tier; }

Tier active_bf16_tier() { return active_for_bf16().load(std::memory_order_relaxed)->tier; }

void set_max_isa(const char* name) {
  const TierStatus* tier = name ? &find_cap(name) : nullptr;
  cap.store(tier, std::memory_order_relaxed);
  active().store(fastest(tier), std::memory_order_relaxed);
  active_for_bf16().store(fastest_for_bf16(tier), std::memory_order_relaxed);
}

const char* max_isa() {
  const TierStatus* tier = cap.load(std::memory_order_relaxed);
  return tier ? tier->name : nullptr;
}

void count_call(Tier tier) { counter(tier).fetch_add(1, std::memory_order_relaxed); }

uint64_t call_count(Tier tier) { return counter(tier).load(std::memory_order_relaxed); }

void reset_call_counts() {
  for (const TierStatus* status : all_tiers()) counter(status->tier).store(0, std::memory_order_relaxed);
}

}  // namespace mbv2
