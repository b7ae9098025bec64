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

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  py::dict result;
  for (const auto& feature : mbv2::cpu_features()) result[py::str(feature.first)] = feature.second;
  return result;
}

py::list tiers() {
  py::list result;
  for (const mbv2::TierStatus& status : mbv2::tiers()) {
    py::dict row;
    row["name"] = status.name;
    row["compiled"] = status.compiled;
    row["runnable"] = status.runnable;
    row["reason"] = status.reason;
    row["features"] = py::str(status.features).attr("split")();
    result.append(row);
  }
  return result;
}

const char* active_tier() {
  const mbv2::Tier active = mbv2::active_tier();
  for (const mbv2::TierStatus& status : mbv2::tiers())
    if (status.tier == active) return status.name;
  throw std::logic_error("the active tier is not in the list of tiers");
}

py::dict counters() {
  py::dict result;
  for (const mbv2::TierStatus& status : mbv2::tiers()) result[status.name] = mbv2::call_count(status.tier);
  return result;
}

double fma_peak(const std::string& tier, double seconds) {
  const mbv2::TierStatus& status = mbv2::find_tier(tier);
  if (!status.runnable) throw std::invalid_argument("tier '" + tier + "' cannot run here: " + status.reason);
  const py::gil_scoped_release release;
  return mbv2::fma_peak(status.tier, seconds);
}

// What modules of a block looked like when it was recognised, so that each call can see in a fraction of a microsecond
// that they still do: in Python, the same look costs more than all the rest of a call. Modules are referred to weakly:
// they own the object that owns this one, and Python's garbage collector does not see into it.
class Watch {
 public:
  // modules: (module, without_hooks, children, settings, present) each. without_hooks: no hook and no forward of its
  // own on the instance. children: (name, module) pairs, all it has. settings: (name, value) pairs among its
  // attributes. present: names of buffers that are not None.
  explicit Watch(const py::iterable& modules) {
    for (const py::handle entry : modules) {
      const auto fields = py::cast<py::tuple>(entry);
      Seen seen{py::weakref(fields[0]), py::cast<bool>(fields[1]), {}, {}, {}};
      for (const py::handle child : fields[2]) {
        const auto pair = py::cast<py::tuple>(child);
        seen.children.emplace_back(pair[0], pair[1].is_none() ? py::object(pair[1]) : py::weakref(pair[1]));
      }
      for (const py::handle setting : fields[3]) {
        const auto pair = py::cast<py::tuple>(setting);
        seen.settings.emplace_back(pair[0], pair[1]);
      }
      for (const py::handle name : fields[4]) seen.present.emplace_back(py::reinterpret_borrow<py::object>(name));
      seen_.push_back(std::move(seen));
    }
  }

  // True if nothing has changed. False says "look closer": something has, or is stored in an unusual way.
  bool unchanged() const {
    for (const Seen& seen : seen_) {
      const py::object module = target(seen.module);
      if (module.is_none()) return false;
      const py::object attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
      if (!attributes) throw py::error_already_set();
      if (!PyDict_Check(attributes.ptr())) return false;
      if (!same(seen, attributes.ptr())) return false;
    }
    return true;
  }

 private:
  using Pairs = std::vector<std::pair<py::object, py::object>>;
  struct Seen {
    py::object module;
    bool without_hooks;
    Pairs children, settings;
    std::vector<py::object> present;
  };

  // What a weak reference refers to; None if that is gone, or for None itself.
  static py::object target(const py::object& reference) {
    if (reference.is_none()) return reference;
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* object = nullptr;
    if (PyWeakref_GetRef(reference.ptr(), &object) < 0) throw py::error_already_set();
    return object ? py::reinterpret_steal<py::object>(object) : py::none();
#else
    return py::reinterpret_borrow<py::object>(PyWeakref_GetObject(reference.ptr()));
#endif
  }

  static PyObject* find(PyObject* dict, const py::object& key) {  // borrowed; null if it is not there
    PyObject* value = dict && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, key.ptr()) : nullptr;
    if (PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  bool same(const Seen& seen, PyObject* attributes) const {
    if (seen.without_hooks) {
      for (const py::object& name : hooks_) {
        PyObject* hooks = find(attributes, name);
        if (!hooks || !PyDict_Check(hooks) || PyDict_Size(hooks) != 0) return false;
      }
      if (find(attributes, forward_)) return false;
    }
    if (!seen.children.empty()) {
      PyObject* children = find(attributes, modules_);
      if (!children || PyDict_Size(children) != static_cast<Py_ssize_t>(seen.children.size())) return false;
      for (const auto& child : seen.children)
        if (find(children, child.first) != target(child.second).ptr()) return false;
    }
    for (const auto& setting : seen.settings) {
      PyObject* value = find(attributes, setting.first);
      if (!value) return false;
      const int equal = PyObject_RichCompareBool(value, setting.second.ptr(), Py_EQ);
      if (equal < 0) throw py::error_already_set();
      if (!equal) return false;
    }
    for (const py::object& name : seen.present) {
      PyObject* value = find(find(attributes, buffers_), name);
      if (!value || value == Py_None) return false;
    }
    return true;
  }

  static py::object interned(const char* text) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
  }
  const std::vector<py::object> hooks_ = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                          interned("_backward_hooks"), interned("_backward_pre_hooks")};
  const py::object forward_ = interned("forward"), modules_ = interned("_modules"), buffers_ = interned("_buffers");
  std::vector<Seen> seen_;
};

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
  m.def("tiers", &tiers, "Every tier, fastest first: name, compiled, runnable, reason (why not), features.");
  m.def("active_tier", &active_tier, "The tier that runs now.");
  m.def("max_isa", &mbv2::max_isa, "The cap on the tier, or None. It begins as MBV2_MAX_ISA.");
  m.def("set_max_isa", &mbv2::set_max_isa, py::arg("name").none(true),
        "Caps the tier; None lifts the cap. ValueError on unknown names.");
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
  m.def("fma_peak", &fma_peak, py::arg("tier"), py::arg("seconds") = 0.1,
        "GFLOP/s of one thread that does nothing but the tier's fused multiply-adds.");
  py::class_<Watch>(m, "Watch", "What the modules of a block looked like, and whether they still do.")
      .def(py::init<const py::iterable&>(), py::arg("modules"),
           "modules: (module, without_hooks, ((child name, child), ...), ((attribute, value), ...), (buffer, ...)).")
      .def("unchanged", &Watch::unchanged, "True if all modules still look the same; False: look closer.");
  cap_from_environment();
}
