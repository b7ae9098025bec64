// What Python objects of a model looked like, and whether they still do: in Python the same look costs more than all
// the rest of a call.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "beside.h"

namespace mbv2 {

namespace py = pybind11;

// The number that CPython changes whenever a dict does (PEP 509): same number, same content, without looking. 0 where
// there is none: from 3.13 on attributes can be written past the dict.
inline uint64_t dict_version(PyObject* dict) {
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  static_cast<void>(dict);
  return 0;
#endif
}

inline PyObject* find(PyObject* dict, const py::object& key) {  // borrowed; null if it is not there
  PyObject* value = PyDict_GetItemWithError(dict, key.ptr());
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline uint64_t type_of(const DlpackTensor& tensor) {  // device type and dtype
  return static_cast<uint64_t>(static_cast<uint32_t>(tensor.device[0])) << 32 | tensor.code << 24 | tensor.bits << 16 |
         tensor.lanes;
}

// Looks at a tensor from C, which costs a tenth of reading its attributes in Python: the table behind
// `torch.Tensor.__dlpack_c_exchange_api__`.
struct DlpackApi {
  uint32_t major, minor;
  DlpackApi* previous;
  void (*unused[3])();
  int (*look)(void* tensor, DlpackTensor* result);  // 0, or -1 with a Python exception set
};

// Raises std::runtime_error if tensors of this type have no such table.
inline const DlpackApi* dlpack_api(const py::object& type) {
  constexpr const char* kName = "__dlpack_c_exchange_api__";
  if (!py::hasattr(type, kName)) throw std::runtime_error("this torch has no DLPack interface for C");
  const py::object capsule = type.attr(kName);
  const auto* api = static_cast<const DlpackApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->major != 1 || !api->look) throw std::runtime_error("this torch has another DLPack interface for C");
  return api;
}

// Modules are referred to weakly: they own the object that owns this one, and Python's garbage collector does not see
// into it. Tensors are held: they own no modules.
class Watch {
 public:
  // modules: (module, plain, forward, children, settings, present, tensors, moving) each.
  //   plain: no hooks, no compiled call, and on the instance the forward `forward`, or none if that is None
  //   children: (name, module) pairs, all it has
  //   settings: (name, value) pairs among its attributes; (name,) is not to be there
  //   present: names of buffers that are not None
  //   tensors: (store, name) each, store "_parameters" or "_buffers": the tensor there, or None, has to stay the same,
  //     in its version, at its address, with its dtype, shape and strides
  //   moving: the same but for version and address: training changes what is in it
  // Raises std::runtime_error for tensors that cannot be watched: those made in inference mode have no version, and a
  // torch without this DLPack interface cannot tell an address fast.
  explicit Watch(const py::iterable& modules) {
    for (const py::handle entry : modules) {
      const auto fields = py::cast<py::tuple>(entry);
      Description& described = descriptions_.emplace_back();
      described.module = py::weakref(fields[0]);
      described.forward = weak(fields[2]);
      Seen seen;
      seen.module = described.module.ptr();
      seen.plain = py::cast<bool>(fields[1]);
      seen.called = !fields[2].is_none();
      if (seen.called) {
        described.type = py::type::of(fields[0]);
        described.call = described.type.attr(call_);
      }
      for (const py::handle child : fields[3]) {
        const auto pair = py::cast<py::tuple>(child);
        described.children.emplace_back(pair[0], weak(pair[1]));
      }
      for (const py::handle setting : fields[4]) {
        const auto pair = py::cast<py::tuple>(setting);
        const py::object value = pair.size() == 2 ? py::object(pair[1]) : py::object();
        const bool owns = value && PyType_SUPPORTS_WEAKREFS(Py_TYPE(value.ptr()));  // maybe modules
        described.settings.emplace_back(pair[0], owns ? weak(value) : value);
      }
      for (const py::handle name : fields[5]) described.present.emplace_back(py::reinterpret_borrow<py::object>(name));
      for (const int field : {6, 7})
        for (const py::handle place : fields[static_cast<size_t>(field)]) {
          const auto where = py::cast<py::tuple>(place);
          const py::object store = where[0], tensor = fields[0].attr(store)[where[1]];
          described.tensors.push_back({store.equal(buffers_), where[1], tensor});
          if (!tensor.is_none()) add_tensor(tensor, field == 7);
        }
      seen.parent = !described.children.empty();
      seen.places = !described.present.empty() || !described.tensors.empty();
      seen.tensors_end = tensors_.size();
      seen_.push_back(seen);
    }
  }

  size_t tensors() const { return tensors_.size(); }

  // True if nothing has changed. False says "look closer": something has, or is stored in an unusual way.
  bool unchanged() {
    size_t fetched = 0, tensor = 0;
    const int64_t* geometry = geometry_.data();
    for (size_t i = 0; i < seen_.size(); ++i) {
      if (!lines_.empty()) {
        const size_t ahead = seen_[std::min(i + kAhead, seen_.size() - 1)].lines_end;
        for (; fetched < ahead; ++fetched) __builtin_prefetch(lines_[fetched]);
      }
      if (!same(seen_[i], descriptions_[i])) return false;
      for (; tensor < seen_[i].tensors_end; ++tensor)
        if (!same(tensors_[tensor], &geometry)) return false;
    }
    if (lines_.empty()) find_lines();
    return true;
  }

 private:
  using Pairs = std::vector<std::pair<py::object, py::object>>;
  struct Place {
    bool buffer;
    py::object name, tensor;  // the tensor held here is borrowed elsewhere
  };
  // What a module has to be, read again where a dict's version has changed.
  struct Description {
    py::object module, forward, type, call;
    Pairs children, settings;
    std::vector<py::object> present;
    std::vector<Place> tensors;
  };
  // What is read in every look is packed into few cache lines: after a network has run none of it is in L2.
  struct SeenTensor {
    PyObject* tensor;
    const PyGetSetDef* version_getter;  // null for one that may move
    uint64_t version;
    const DlpackApi* api;  // null for a BatchNorm's count of batches, whose memory nobody reads here
    const void* data;
    uint64_t type;
    size_t dims;  // `geometry_` has twice as many numbers of it
  };
  struct Seen {
    PyObject* module = nullptr;                                          // a weak reference
    bool plain = false, called = false, parent = false, places = false;  // what its description asks for
    // The dicts of the module, borrowed from it, and their versions when all in them was last found the same.
    PyObject *hooks[4] = {}, *modules = nullptr, *parameters = nullptr, *buffers = nullptr;
    uint64_t attributes_version = 0, modules_version = 0, parameters_version = 0, buffers_version = 0;
    size_t tensors_end = 0, lines_end = 0;
  };

  // Modules whose lines are fetched ahead of the one that is looked at.
  static constexpr size_t kAhead = 6;

  void add_tensor(const py::object& tensor, bool moves) {
    SeenTensor seen = {tensor.ptr(), nullptr, 0, dlpack_api(py::type::of(tensor)), nullptr, 0, 0};
    if (!moves) {
      seen.version_getter = version_getter(tensor);
      seen.version = version_of(seen);
    }
    const DlpackTensor now = look(seen);
    seen.data = now.data;
    seen.type = type_of(now);
    seen.dims = static_cast<size_t>(now.dims);
    if (now.dims == 0) seen.api = nullptr;
    geometry_.insert(geometry_.end(), now.shape, now.shape + now.dims);
    geometry_.insert(geometry_.end(), now.strides, now.strides + now.dims);
    tensors_.push_back(seen);
  }

  bool same(Seen& seen, const Description& described) {
    const py::object module = target(seen.module);
    if (module.is_none()) return false;
    const py::object attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
    if (!attributes) throw py::error_already_set();
    if (!PyDict_Check(attributes.ptr())) return false;
    const uint64_t version = dict_version(attributes.ptr());
    if (version == 0 || version != seen.attributes_version) {
      if (!same_attributes(seen, described, attributes.ptr())) return false;
      seen.attributes_version = version;
      seen.modules_version = seen.parameters_version = seen.buffers_version = 0;
    }
    if (seen.plain)
      for (PyObject* hooks : seen.hooks)
        if (PyDict_GET_SIZE(hooks) != 0) return false;
    if (seen.called && (Py_TYPE(module.ptr()) != reinterpret_cast<PyTypeObject*>(described.type.ptr()) ||
                        !py::object(described.type.attr(call_)).is(described.call)))
      return false;
    return (!seen.parent || same_children(seen, described)) && (!seen.places || same_places(seen, described));
  }

  bool same_attributes(Seen& seen, const Description& described, PyObject* attributes) const {
    if (seen.plain) {
      for (int i = 0; i < 4; ++i) {
        seen.hooks[i] = find_dict(attributes, hooks_[i]);
        if (!seen.hooks[i]) return false;
      }
      PyObject* forward = find(attributes, forward_);
      PyObject* compiled = find(attributes, compiled_call_);
      const py::object expected = target(described.forward.ptr());
      if ((forward ? forward : Py_None) != expected.ptr() || (compiled && compiled != Py_None)) return false;
    }
    for (const auto& setting : described.settings) {
      PyObject* value = find(attributes, setting.first);
      if (!value && !setting.second) continue;
      if (!value || !setting.second) return false;
      const bool is_weak = PyWeakref_Check(setting.second.ptr());
      const py::object expected = is_weak ? target(setting.second.ptr()) : setting.second;
      const int equal = PyObject_RichCompareBool(value, expected.ptr(), Py_EQ);
      if (equal < 0) throw py::error_already_set();
      if (!equal) return false;
    }
    seen.modules = find_dict(attributes, modules_);
    seen.parameters = find_dict(attributes, parameters_);
    seen.buffers = find_dict(attributes, buffers_);
    return seen.modules && seen.parameters && seen.buffers;
  }

  static bool same_children(Seen& seen, const Description& described) {
    const uint64_t version = dict_version(seen.modules);
    if (version != 0 && version == seen.modules_version) return true;
    if (PyDict_GET_SIZE(seen.modules) != static_cast<Py_ssize_t>(described.children.size())) return false;
    for (const auto& child : described.children)
      if (find(seen.modules, child.first) != target(child.second.ptr()).ptr()) return false;
    seen.modules_version = version;
    return true;
  }

  // Whether the tensors are still where they were.
  static bool same_places(Seen& seen, const Description& described) {
    const uint64_t parameters = dict_version(seen.parameters), buffers = dict_version(seen.buffers);
    if (parameters != 0 && parameters == seen.parameters_version && buffers == seen.buffers_version) return true;
    for (const py::object& name : described.present) {
      PyObject* value = find(seen.buffers, name);
      if (!value || value == Py_None) return false;
    }
    for (const Place& place : described.tensors)
      if (find(place.buffer ? seen.buffers : seen.parameters, place.name) != place.tensor.ptr()) return false;
    seen.parameters_version = parameters;
    seen.buffers_version = buffers;
    return true;
  }

  static bool same(const SeenTensor& seen, const int64_t** geometry) {
    const int64_t* last = *geometry;
    *geometry += 2 * seen.dims;
    const bool moves = !seen.version_getter;
    if (!moves && version_of(seen) != seen.version) return false;
    if (!seen.api) return true;
    const DlpackTensor now = look(seen);
    return (moves || now.data == seen.data) && type_of(now) == seen.type &&
           static_cast<size_t>(now.dims) == seen.dims && std::equal(now.shape, now.shape + seen.dims, last) &&
           std::equal(now.strides, now.strides + seen.dims, last + seen.dims);
  }

  // Where `unchanged` reads, as far as one can tell; an address that is wrong or out of date costs time and nothing
  // else. The offsets are those of CPython's dicts and of torch's tensors, whose memory and count of versions are
  // objects of their own.
  void find_lines() {
    size_t tensor = 0;
    for (Seen& seen : seen_) {
      const py::object module = target(seen.module);
      add_line(seen.module, 0);
      add_line(module.ptr(), -24);
      add_line(module.ptr(), 0);
      const py::object attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
      add_line(attributes.ptr(), 24);
      if (seen.plain)
        for (PyObject* hooks : seen.hooks) add_line(hooks, 16);
      if (seen.parent) add_line(seen.modules, 24);
      if (seen.places) {
        add_line(seen.parameters, 24);
        add_line(seen.buffers, 24);
      }
      for (; tensor < seen.tensors_end; ++tensor) {
        PyObject* object = tensors_[tensor].tensor;
        add_line(object, 8);
        const auto address = py::reinterpret_steal<py::object>(PyObject_GetAttrString(object, "_cdata"));
        const void* implementation = address ? PyLong_AsVoidPtr(address.ptr()) : nullptr;
        PyErr_Clear();
        if (!implementation) continue;
        for (int line = 0; line < 3; ++line) add_line(implementation, 64 * line);
        for (const size_t word : {2, 5}) {
          const void* part;
          std::memcpy(&part, static_cast<const char*>(implementation) + word * sizeof part, sizeof part);
          add_line(part, 16);
        }
      }
      seen.lines_end = lines_.size();
    }
  }
  void add_line(const void* from, std::ptrdiff_t offset) {
    const auto line = reinterpret_cast<const char*>((reinterpret_cast<uintptr_t>(from) + offset) / 64 * 64);
    if (lines_.empty() || lines_.back() != line) lines_.push_back(line);
  }

  static py::object weak(const py::handle object) {
    return object.is_none() ? py::reinterpret_borrow<py::object>(object) : py::weakref(object);
  }

  // What a weak reference refers to; None if that is gone, or for None itself.
  static py::object target(PyObject* reference) {
    if (reference == Py_None) return py::none();
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* object = nullptr;
    if (PyWeakref_GetRef(reference, &object) < 0) throw py::error_already_set();
    return object ? py::reinterpret_steal<py::object>(object) : py::none();
#else
    return py::reinterpret_borrow<py::object>(PyWeakref_GetObject(reference));
#endif
  }

  static PyObject* find_dict(PyObject* dict, const py::object& key) {
    PyObject* value = find(dict, key);
    return value && PyDict_Check(value) ? value : nullptr;
  }

  // torch's own getter of `_version`, called past the lookup of the attribute, which takes half as long again.
  const PyGetSetDef* version_getter(const py::object& tensor) const {
    const py::object found = py::type::of(tensor).attr(version_);
    if (Py_TYPE(found.ptr()) != &PyGetSetDescr_Type || !PyObject_TypeCheck(tensor.ptr(), PyDescr_TYPE(found.ptr())))
      throw std::runtime_error("a tensor with a version of its own kind");
    return reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;  // static, as C classes' tables are
  }
  static uint64_t version_of(const SeenTensor& seen) {
    const auto value =
        py::reinterpret_steal<py::object>(seen.version_getter->get(seen.tensor, seen.version_getter->closure));
    if (!value) throw py::error_already_set();
    return PyLong_AsUnsignedLongLong(value.ptr());
  }
  static DlpackTensor look(const SeenTensor& seen) {
    DlpackTensor now;
    if (seen.api->look(seen.tensor, &now) != 0) throw py::error_already_set();
    return now;
  }

  static py::object interned(const char* text) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
  }
  const py::object hooks_[4] = {interned("_forward_hooks"), interned("_forward_pre_hooks"), interned("_backward_hooks"),
                                interned("_backward_pre_hooks")};
  const py::object forward_ = interned("forward"), compiled_call_ = interned("_compiled_call_impl"),
                   call_ = interned("__call__"), modules_ = interned("_modules"), parameters_ = interned("_parameters"),
                   buffers_ = interned("_buffers"), version_ = interned("_version");
  std::vector<Description> descriptions_;  // of the modules in `seen_`
  std::vector<Seen> seen_;
  std::vector<SeenTensor> tensors_;
  std::vector<int64_t> geometry_;  // of the tensors: shape and strides
  std::vector<const char*> lines_;
};

}  // namespace mbv2
