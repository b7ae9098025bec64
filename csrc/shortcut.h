// The op of a call whose questions have all been asked before, as long as their answers are the same.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <utility>
#include <vector>

#include "beside.h"
#include "core/arch.h"
#include "watch.h"

namespace mbv2 {

class Shortcut {
 public:
  // op(x, *arguments) is what to call;
  // images: a tensor that x has to be like: of its very type, its device type, dtype, rank and channels, with at most
  //     its number of images
  // questions: (function, arguments) each, whose answer has to be false
  // variables: (dict, name, value) each: the very value has to be there
  // watch: a Watch that has to be unchanged; the tier that runs now for images of that dtype has to run still
  Shortcut(py::object op, const py::iterable& arguments, const py::object& images, const py::iterable& questions,
           const py::iterable& variables, py::object watch)
      : op_(std::move(op)),
        type_(py::type::of(images)),
        api_(dlpack_api(type_)),
        watch_object_(std::move(watch)),
        watch_(py::cast<Watch&>(watch_object_)) {
    DlpackTensor like;
    if (api_->look(images.ptr(), &like) != 0) throw py::error_already_set();
    tensor_type_ = type_of(like);
    active_tier_ = like.code == kDlpackBfloat ? active_bf16_tier : active_tier;
    tier_ = active_tier_();
    dims_ = like.dims;
    most_images_ = like.shape[0];
    channels_ = like.shape[1];
    for (const py::handle argument : arguments) arguments_.push_back(py::reinterpret_borrow<py::object>(argument));
    if (arguments_.size() > kMostArguments) throw std::invalid_argument("too many arguments");
    chain_ = arguments_.empty() ? nullptr : chain_of(arguments_[0]);
    for (const py::handle question : questions) {
      const auto pair = py::cast<py::tuple>(question);
      questions_.emplace_back(pair[0], pair[1]);
    }
    for (const py::handle variable : variables) {
      const auto fields = py::cast<py::tuple>(variable);
      variables_.push_back({fields[0], fields[1], fields[2]});
    }
  }

  // None says "look closer".
  py::object operator()(const py::handle x) {
    DlpackTensor image;
    if (!fits(x, &image) || !quiet()) return py::none();
    const FirstLayer first_layer;
    if (!unchanged(image)) return py::none();
    PyObject* given[1 + kMostArguments] = {x.ptr()};
    for (size_t i = 0; i < arguments_.size(); ++i) given[1 + i] = arguments_[i].ptr();
    PyObject* y = PyObject_Vectorcall(op_.ptr(), given, 1 + arguments_.size(), nullptr);
    if (!y) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(y);
  }

 private:
  static constexpr size_t kMostArguments = 4;
  struct Variable {
    py::object space, name, value;
  };

  // What it may leave behind is of this call.
  struct FirstLayer {
    ~FirstLayer() { forget_first_layer(); }
  };

  bool fits(const py::handle x, DlpackTensor* image) const {
    if (Py_TYPE(x.ptr()) != reinterpret_cast<PyTypeObject*>(type_.ptr())) return false;
    DlpackTensor& now = *image;
    if (api_->look(x.ptr(), &now) != 0) {  // not every tensor is dense memory
      PyErr_Clear();
      return false;
    }
    return type_of(now) == tensor_type_ && now.dims == dims_ && now.shape[0] <= most_images_ &&
           now.shape[1] == channels_;
  }

  // `mbv2::pack_chain` returns a tensor of one number.
  const int64_t* chain_of(const py::object& argument) const {
    DlpackTensor tensor;
    if (Py_TYPE(argument.ptr()) != reinterpret_cast<PyTypeObject*>(type_.ptr())) return nullptr;
    if (api_->look(argument.ptr(), &tensor) != 0) throw py::error_already_set();
    const bool number = tensor.code == kDlpackInt && tensor.bits == 64 && tensor.dims == 1 && tensor.shape[0] == 1;
    return number ? static_cast<const int64_t*>(tensor.data) : nullptr;
  }

  bool quiet() const {
    if (active_tier_() != tier_) return false;
    for (const Variable& variable : variables_)
      if (find(variable.space.ptr(), variable.name) != variable.value.ptr()) return false;
    for (const auto& [function, arguments] : questions_) {
      const auto answer = py::reinterpret_steal<py::object>(PyObject_Call(function.ptr(), arguments.ptr(), nullptr));
      const int yes = answer ? PyObject_IsTrue(answer.ptr()) : -1;
      if (yes < 0) throw py::error_already_set();
      if (yes) return false;
    }
    return true;
  }

  // The look; a short one is not worth other threads' while.
  bool unchanged(const DlpackTensor& image) {
    constexpr size_t kLong = 32;
    if (watch_.tensors() < kLong) return watch_.unchanged();
    struct Look {
      Watch& watch;
      bool unchanged;
      std::exception_ptr error;
    } look = {watch_, false, nullptr};
    look_beside_first_layer(chain_, image, &look, [](void* context) {
      auto& own = *static_cast<Look*>(context);
      try {
        own.unchanged = own.watch.unchanged();
      } catch (...) {
        own.error = std::current_exception();
      }
    });
    if (look.error) std::rethrow_exception(look.error);
    return look.unchanged;
  }

  // None of them owns a module, and so this object: Python's garbage collector does not see into it.
  const py::object op_, type_;
  const DlpackApi* api_;
  const py::object watch_object_;
  Watch& watch_;
  Tier (*active_tier_)();
  Tier tier_;
  uint64_t tensor_type_;
  int32_t dims_;
  int64_t most_images_, channels_;
  std::vector<py::object> arguments_;
  const int64_t* chain_ = nullptr;  // in the first argument, if that is one
  std::vector<std::pair<py::object, py::object>> questions_;
  std::vector<Variable> variables_;
};

}  // namespace mbv2
