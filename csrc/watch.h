// What Python objects of a model looked like, and whether they still do: in Python the same look costs more than all
// the rest of a call.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

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

// DLPack's way to look at a tensor from C, which costs a tenth of reading its attributes in Python. As in dlpack.h 1.3
// (https://github.com/dmlc/dlpack): the first fields of the table behind `torch.Tensor.__dlpack_c_exchange_api__`.
struct DlpackTensor {
  void* data;
  int32_t device[2];
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DlpackApi {
  uint32_t major, minor;
  DlpackApi* previous;
  void (*unused[3])();
  int (*look)(void* tensor, DlpackTensor* result);  // 0, or -1 with a Python exception set
};

// Modules are referred to weakly: they own the object that owns this one, and Python's garbage collector does not see
// into it. Tensors are held: they own no modules.
class Watch {
 public:
  // modules: (module, plain, forward, children, settings, present, tensors) each.
  //   plain: no hooks, no compiled call, and on the instance the forward `forward`, or none if that is None
  //   children: (name, module) pairs, all it has
  //   settings: (name, value) pairs among its attributes
  //   present: names of buffers that are not None
  //   tensors: (store, name) each, store "_parameters" or "_buffers": the tensor there, or None, has to stay the same,
  //     in its version, at its address, with its shape and strides
  // Raises std::runtime_error for tensors that cannot be watched: those made in inference mode have no version, and a
  // torch without this DLPack interface cannot tell an address fast.
  explicit Watch(const py::iterable& modules) {
    for (const py::handle entry : modules) {
      const auto fields = py::cast<py::tuple>(entry);
      Seen seen;
      seen.module = py::weakref(fields[0]);
      seen.plain = py::cast<bool>(fields[1]);
      seen.forward = weak(fields[2]);
      if (!fields[2].is_none()) {
        seen.type = py::type::of(fields[0]);
        seen.call = get(seen.type, call_);
      }
      for (const py::handle child : fields[3]) {
        const auto pair = py::cast<py::tuple>(child);
        seen.children.emplace_back(pair[0], weak(pair[1]));
      }
      for (const py::handle setting : fields[4]) {
        const auto pair = py::cast<py::tuple>(setting);
        seen.settings.emplace_back(pair[0], pair[1]);
      }
      for (const py::handle name : fields[5]) seen.present.emplace_back(py::reinterpret_borrow<py::object>(name));
      for (const py::handle described : fields[6]) {
        const auto where = py::cast<py::tuple>(described);
        const py::object store = where[0], tensor = fields[0].attr(store)[where[1]];
        SeenTensor& last = seen.tensors.emplace_back();
        last.buffer = store.equal(buffers_);
        last.name = where[1];
        last.tensor = tensor;
        if (tensor.is_none()) continue;
        last.getter = version_getter(tensor);
        last.version = version_of(last);
        last.api = dlpack_api(tensor);
        const DlpackTensor now = look(last);
        if (now.dims == 0) last.api = nullptr;  // a BatchNorm's count of batches, which nobody reads here
        last.data = now.data;
        last.geometry.assign(now.shape, now.shape + now.dims);
        last.geometry.insert(last.geometry.end(), now.strides, now.strides + now.dims);
      }
      seen_.push_back(std::move(seen));
    }
  }

  // True if nothing has changed. False says "look closer": something has, or is stored in an unusual way.
  bool unchanged() {
    for (Seen& seen : seen_)
      if (!same(seen)) return false;
    return true;
  }

 private:
  using Pairs = std::vector<std::pair<py::object, py::object>>;
  struct SeenTensor {
    bool buffer = false;
    py::object name, tensor;
    const PyGetSetDef* getter = nullptr;
    const DlpackApi* api = nullptr;
    uint64_t version = 0;
    const void* data = nullptr;
    std::vector<int64_t> geometry;
  };
  struct Seen {
    py::object module;
    bool plain = false;
    py::object forward, type, call;
    Pairs children, settings;
    std::vector<py::object> present;
    std::vector<SeenTensor> tensors;
    // The dicts of the module, borrowed from it, and their versions when all in them was last found the same.
    PyObject *hooks[4] = {}, *modules = nullptr, *parameters = nullptr, *buffers = nullptr;
    uint64_t attributes_version = 0, modules_version = 0, parameters_version = 0, buffers_version = 0;
  };

  bool same(Seen& seen) {
    const py::object module = target(seen.module);
    if (module.is_none()) return false;
    const py::object attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
    if (!attributes) throw py::error_already_set();
    if (!PyDict_Check(attributes.ptr())) return false;
    const uint64_t version = dict_version(attributes.ptr());
    if (version == 0 || version != seen.attributes_version) {
      if (!same_attributes(seen, attributes.ptr())) return false;
      seen.attributes_version = version;
      seen.modules_version = seen.parameters_version = seen.buffers_version = 0;
    }
    if (seen.plain)
      for (PyObject* hooks : seen.hooks)
        if (PyDict_GET_SIZE(hooks) != 0) return false;
    if (seen.type && (Py_TYPE(module.ptr()) != reinterpret_cast<PyTypeObject*>(seen.type.ptr()) ||
                      !get(seen.type, call_).is(seen.call)))
      return false;
    return same_children(seen) && same_tensors(seen);
  }

  bool same_attributes(Seen& seen, PyObject* attributes) {
    if (seen.plain) {
      for (int i = 0; i < 4; ++i) {
        seen.hooks[i] = find_dict(attributes, hooks_[i]);
        if (!seen.hooks[i]) return false;
      }
      PyObject* forward = find(attributes, forward_);
      PyObject* compiled = find(attributes, compiled_call_);
      const py::object expected = target(seen.forward);
      if ((forward ? forward : Py_None) != expected.ptr() || (compiled && compiled != Py_None)) return false;
    }
    for (const auto& setting : seen.settings) {
      PyObject* value = find(attributes, setting.first);
      if (!value) return false;
      const int equal = PyObject_RichCompareBool(value, setting.second.ptr(), Py_EQ);
      if (equal < 0) throw py::error_already_set();
      if (!equal) return false;
    }
    seen.modules = find_dict(attributes, modules_);
    seen.parameters = find_dict(attributes, parameters_);
    seen.buffers = find_dict(attributes, buffers_);
    return seen.modules && seen.parameters && seen.buffers;
  }

  bool same_children(Seen& seen) const {
    if (seen.children.empty()) return true;
    const uint64_t version = dict_version(seen.modules);
    if (version != 0 && version == seen.modules_version) return true;
    if (PyDict_GET_SIZE(seen.modules) != static_cast<Py_ssize_t>(seen.children.size())) return false;
    for (const auto& child : seen.children)
      if (find(seen.modules, child.first) != target(child.second).ptr()) return false;
    seen.modules_version = version;
    return true;
  }

  bool same_tensors(Seen& seen) const {
    if (seen.present.empty() && seen.tensors.empty()) return true;
    const uint64_t parameters = dict_version(seen.parameters), buffers = dict_version(seen.buffers);
    const bool look = parameters == 0 || parameters != seen.parameters_version || buffers != seen.buffers_version;
    if (look) {
      for (const py::object& name : seen.present) {
        PyObject* value = find(seen.buffers, name);
        if (!value || value == Py_None) return false;
      }
      for (const SeenTensor& last : seen.tensors)
        if (find(last.buffer ? seen.buffers : seen.parameters, last.name) != last.tensor.ptr()) return false;
      seen.parameters_version = parameters;
      seen.buffers_version = buffers;
    }
    for (const SeenTensor& last : seen.tensors)
      if (last.getter && (version_of(last) != last.version || (last.api && !same_memory(last)))) return false;
    return true;
  }

  static py::object weak(const py::handle object) {
    return object.is_none() ? py::reinterpret_borrow<py::object>(object) : py::weakref(object);
  }

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
    PyObject* value = PyDict_GetItemWithError(dict, key.ptr());
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  static PyObject* find_dict(PyObject* dict, const py::object& key) {
    PyObject* value = find(dict, key);
    return value && PyDict_Check(value) ? value : nullptr;
  }

  // torch's own getter of `_version`, called past the lookup of the attribute, which takes half as long again.
  const PyGetSetDef* version_getter(const py::object& tensor) const {
    const py::object found = get(py::type::of(tensor), version_);
    if (Py_TYPE(found.ptr()) != &PyGetSetDescr_Type || !PyObject_TypeCheck(tensor.ptr(), PyDescr_TYPE(found.ptr())))
      throw std::runtime_error("a tensor with a version of its own kind");
    return reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;  // static, as C classes' tables are
  }
  static uint64_t version_of(const SeenTensor& seen) {
    const auto value = py::reinterpret_steal<py::object>(seen.getter->get(seen.tensor.ptr(), seen.getter->closure));
    if (!value) throw py::error_already_set();
    return PyLong_AsUnsignedLongLong(value.ptr());
  }
  const DlpackApi* dlpack_api(const py::object& tensor) const {
    const py::object type = py::type::of(tensor);
    if (!py::hasattr(type, dlpack_)) throw std::runtime_error("this torch has no DLPack interface for C");
    const auto* api =
        static_cast<const DlpackApi*>(PyCapsule_GetPointer(get(type, dlpack_).ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->major != 1 || !api->look) throw std::runtime_error("this torch has another DLPack interface for C");
    return api;
  }
  static DlpackTensor look(const SeenTensor& seen) {
    DlpackTensor now;
    if (seen.api->look(seen.tensor.ptr(), &now) != 0) throw py::error_already_set();
    return now;
  }
  static bool same_memory(const SeenTensor& seen) {
    const DlpackTensor now = look(seen);
    const auto dims = static_cast<size_t>(now.dims);
    const int64_t* last = seen.geometry.data();
    return now.data == seen.data && 2 * dims == seen.geometry.size() && std::equal(now.shape, now.shape + dims, last) &&
           std::equal(now.strides, now.strides + dims, last + dims);
  }
  static py::object get(const py::object& object, const py::object& attribute) { return object.attr(attribute); }

  static py::object interned(const char* text) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
  }
  const py::object hooks_[4] = {interned("_forward_hooks"), interned("_forward_pre_hooks"), interned("_backward_hooks"),
                                interned("_backward_pre_hooks")};
  const py::object forward_ = interned("forward"), compiled_call_ = interned("_compiled_call_impl"),
                   call_ = interned("__call__"), modules_ = interned("_modules"), parameters_ = interned("_parameters"),
                   buffers_ = interned("_buffers"), version_ = interned("_version"),
                   dlpack_ = interned("__dlpack_c_exchange_api__");
  std::vector<Seen> seen_;
};

}  // namespace mbv2
