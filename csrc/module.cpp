// The Python module mbv2_kernels._C: what the CPU offers, which tier runs, and how often each ran. The torch ops of the
// same shared object (ops.cpp) register themselves when it is loaded. No torch header here: pybind11's own are newer.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/arch.h"
#include "core/block.h"
#include "core/pages.h"
#include "core/scratch.h"
#include "shortcut.h"
#include "watch.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  py::dict result;
  for (const auto& feature : mbv2::cpu_features()) result[py::str(feature.first)] = feature.second;
  return result;
}

py::dict tier_row(const mbv2::TierStatus& status) {
  py::dict row;
  row["name"] = status.name;
  row["compiled"] = status.compiled;
  row["runnable"] = status.runnable;
  row["reason"] = status.reason;
  row["features"] = py::str(status.features).attr("split")();
  return row;
}

py::list tiers() {
  py::list result;
  for (const mbv2::TierStatus& status : mbv2::tiers()) result.append(tier_row(status));
  return result;
}

py::list all_tiers() {
  py::list result;
  for (const mbv2::TierStatus* status : mbv2::all_tiers()) result.append(tier_row(*status));
  return result;
}

py::dict counters() {
  py::dict result;
  for (const mbv2::TierStatus* status : mbv2::all_tiers()) result[status->name] = mbv2::call_count(status->tier);
  return result;
}

double fma_peak(const std::string& name, double seconds) {
  const mbv2::Tier tier = mbv2::runnable_tier(name).tier;
  const py::gil_scoped_release release;
  return mbv2::fma_peak(tier, seconds);
}

void cap_from_environment() {
  const char* name = std::getenv("MBV2_MAX_ISA");
  if (!name || !*name) return;
  try {
    mbv2::set_max_isa(name);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument("environment variable MBV2_MAX_ISA: " + std::string(error.what()));
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU features, instruction-set tiers and call counters of mbv2_kernels";
  m.def("cpu_features", &cpu_features, "Features the CPU has and the operating system lets programs use.");
  m.def("tiers", &tiers,
        "Every tier that computes in fp32, fastest first: name, compiled, runnable, reason (why not), features.");
  m.def("bf16_tier", [] { return tier_row(mbv2::bf16_tier()); }, "The tier that multiplies bf16, as a row of tiers().");
  m.def(
      "fp16_tier", [] { return tier_row(mbv2::fp16_tier()); }, "The tier that computes in fp16, as a row of tiers().");
  m.def("all_tiers", &all_tiers, "tiers(), bf16_tier() and fp16_tier().");
  m.def("active_tier", [] { return mbv2::status_of(mbv2::active_tier()).name; }, "The fp32 tier that runs now.");
  m.def(
      "active_bf16_tier", [] { return mbv2::status_of(mbv2::active_bf16_tier()).name; },
      "The tier that runs now for bfloat16 images in inference: bf16_tier() if it can and no fp32 tier is the cap.");
  m.def("max_isa", &mbv2::max_isa, "The cap on the tiers, or None. It begins as MBV2_MAX_ISA.");
  m.def("set_max_isa", &mbv2::set_max_isa, py::arg("name").none(true),
        "Caps the tiers; None lifts the cap. bf16_tier() is above all of tiers(). ValueError on unknown names.");
  m.def("counters", &counters, "Calls of the fused block by tier since the last reset.");
  m.def("reset_counters", &mbv2::reset_call_counts);
  m.def("kept_bytes", &mbv2::kept_bytes, "Bytes of working memory that this thread keeps between calls.");
  m.def(
      "mapped_memory",
      [] {
        const mbv2::MappedMemory memory = mbv2::mapped_memory();
        return py::make_tuple(memory.mapped, memory.used);
      },
      "Bytes of address space behind packed weights and working memory, and bytes of it in use; of all threads.");
  m.def("fma_peak", &fma_peak, py::arg("name"), py::arg("seconds") = 0.1,
        "GFLOP/s of one thread that does nothing but the tier's fused multiply-adds.");
  py::class_<mbv2::Watch>(m, "Watch", "What modules and their tensors looked like, and whether they still do.")
      .def(py::init<const py::iterable&>(), py::arg("modules"),
           "modules: (module, plain, forward, children, settings, present, tensors, moving) each; see csrc/watch.h.")
      .def("unchanged", &mbv2::Watch::unchanged, "True if everything still looks the same; False: look closer.");
  py::class_<mbv2::Shortcut>(m, "Shortcut", "An op's call that was found to be all there is to do, while it is.")
      .def(py::init<py::object, const py::iterable&, const py::object&, const py::iterable&, const py::iterable&,
                    py::object>(),
           py::arg("op"), py::arg("arguments"), py::arg("images"), py::arg("questions"), py::arg("variables"),
           py::arg("watch"), "See csrc/shortcut.h.")
      .def("__call__", &mbv2::Shortcut::operator(), py::arg("x"), "op(x, *arguments), or None: look closer.");
  cap_from_environment();
}
