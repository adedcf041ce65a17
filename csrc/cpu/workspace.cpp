#include "workspace.h"

#include <ATen/Parallel.h>

#include <mutex>
#include <unordered_map>

#include "tile.h"

namespace ck {
namespace {

struct Memory {
  at::DataPtr data;
  int64_t bytes = 0;
};

struct Workspace {
  std::mutex mutex;
  int64_t limit = int64_t{64} << 20;
  int64_t used = 0;
  std::unordered_map<const void*, Memory> taken;  // by where it lies
  // the last memory that came back, for the next one: fresh pages cost as much as some products
  Memory spare;
  std::unordered_map<const void*, KeptLogits> holders;  // by where the values lie
};

// never destroyed: tensors may outlive it
Workspace& workspace() {
  static Workspace* const one = new Workspace;
  return *one;
}

using Lock = std::lock_guard<std::mutex>;

void give_back(void* data) {
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  const auto found = w.taken.find(data);
  Memory memory = std::move(found->second);
  w.taken.erase(found);
  w.used -= memory.bytes;
  if (memory.bytes >= w.spare.bytes && memory.bytes + w.used <= w.limit)
    w.spare = std::move(memory);
}

}  // namespace

int64_t workspace_limit() {
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  return w.limit;
}

void set_workspace_limit(int64_t bytes) {
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  w.limit = bytes;
  w.spare = Memory();
}

int64_t workspace_used() {
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  return w.used;
}

KeptLogits take_logits(int64_t rows, int64_t keys, int64_t block, at::ScalarType type, bool half) {
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  const int64_t padded = (rows + kRowPadding - 1) / kRowPadding * kRowPadding;
  const int64_t of_block = padded * block * static_cast<int64_t>(at::elementSize(type));
  const int64_t blocks = (keys + block - 1) / block;
  const int64_t kept = std::min(blocks, (w.limit - w.used) / of_block);
  if (kept <= 0 || (half && kept < blocks)) return {};
  Memory memory = std::move(w.spare);
  w.spare = Memory();
  if (memory.bytes < kept * of_block) {
    memory = Memory();  // gone before more is asked for
    memory.bytes = kept * of_block;
    memory.data = at::getCPUAllocator()->allocate(memory.bytes);
  }
  void* const data = memory.data.get();
  w.used += memory.bytes;
  w.taken.emplace(data, std::move(memory));
  return {
      .memory = at::from_blob(data, {padded, kept * block}, give_back, at::TensorOptions(type)),
      .keys = keys,
      .block = block,
      .blocks = blocks,
      .kept = kept,
      .half = half,
      .threads = at::get_num_threads(),
  };
}

at::Tensor tie_logits(const at::Tensor& values, const KeptLogits& kept) {
  const at::Tensor own = values.clone();
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  w.holders.emplace(own.const_data_ptr(), kept);
  const auto end = [own](void* data) {
    Workspace& w = workspace();
    KeptLogits ended;  // outlives the lock, which its own end takes
    const Lock lock(w.mutex);
    const auto found = w.holders.find(data);
    ended = std::move(found->second);
    w.holders.erase(found);
  };
  return at::from_blob(own.data_ptr(), own.sizes(), end, own.options());
}

KeptLogits find_logits(const at::Tensor& values) {
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  const auto found = w.holders.find(values.const_data_ptr());
  return found == w.holders.end() ? KeptLogits{} : found->second;
}

}  // namespace ck
