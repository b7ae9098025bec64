#include "pages.h"

#include <sys/mman.h>

#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

namespace mbv2 {
namespace {

constexpr size_t kPage = size_t{2} << 20, kRegion = 4 * kPage, kLine = 64;

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

using Ranges = std::map<char*, size_t>;  // where they begin: bytes

struct Region {
  size_t bytes;
  Ranges free;  // never adjoin
};

// `bytes` of zeros, aligned to a huge page.
char* map_pages(size_t bytes) {
  void* mapped = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(mapped);
  const size_t before = (kPage - reinterpret_cast<uintptr_t>(begin) % kPage) % kPage;
  if (before) munmap(begin, before);
  if (before < kPage) munmap(begin + before + bytes, kPage - before);
#ifdef MADV_HUGEPAGE
  madvise(begin + before, bytes, MADV_HUGEPAGE);  // a kernel without huge pages refuses: small ones then
#endif
  return begin + before;
}

class Pages {
 public:
  char* allocate(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [begin, region] : regions_)
      for (const auto& [at, size] : region.free)
        if (size >= bytes) return take(region, at, bytes);
    const size_t size = bytes > kRegion ? round_up(bytes, kPage) : kRegion;
    char* begin = map_pages(size);
    Region& region = regions_[begin];
    region = {size, {{begin, size}}};
    return take(region, begin, bytes);
  }

  void release(char* at) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto used = used_.find(at);
    const auto region = std::prev(regions_.upper_bound(at));
    Ranges& free = region->second.free;
    auto range = free.emplace(at, used->second).first;
    used_.erase(used);
    const auto next = std::next(range);
    if (next != free.end() && range->first + range->second == next->first) {
      range->second += next->second;
      free.erase(next);
    }
    if (range != free.begin()) {
      const auto before = std::prev(range);
      if (before->first + before->second == range->first) {
        before->second += range->second;
        free.erase(range);
      }
    }
    give_back(region);
  }

  MappedMemory sizes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    MappedMemory all = {0, 0};
    for (const auto& [begin, region] : regions_) all.mapped += region.bytes;
    for (const auto& [at, bytes] : used_) all.used += bytes;
    return all;
  }

 private:
  char* take(Region& region, char* at, size_t bytes) {
    const size_t rest = region.free[at] - bytes;
    region.free.erase(at);
    if (rest) region.free[at + bytes] = rest;
    used_[at] = bytes;
    return at;
  }

  static bool is_empty(const Region& region) {
    return region.free.size() == 1 && region.free.begin()->second == region.bytes;
  }

  // One empty region of the usual size stays: a caller that packs, runs and forgets would map pages in every call.
  void give_back(std::map<char*, Region>::iterator empty) {
    if (!is_empty(empty->second)) return;
    bool spare = false;
    for (auto it = regions_.begin(); it != regions_.end(); ++it)
      spare |= it != empty && it->second.bytes == kRegion && is_empty(it->second);
    if (!spare && empty->second.bytes == kRegion) return;
    munmap(empty->first, empty->second.bytes);
    regions_.erase(empty);
  }

  std::mutex mutex_;
  std::map<char*, Region> regions_;
  Ranges used_;
};

// Never destroyed: tensors may be released after the destructors of globals have run.
Pages& pages() {
  static Pages* const all = new Pages;
  return *all;
}

}  // namespace

float* allocate(size_t floats) {
  const size_t bytes = round_up(floats * sizeof(float), kLine);
  return reinterpret_cast<float*>(pages().allocate(bytes ? bytes : kLine));
}

void release(float* memory) noexcept {
  if (memory) pages().release(reinterpret_cast<char*>(memory));
}

MappedMemory mapped_memory() { return pages().sizes(); }

}  // namespace mbv2
