// A tensor argument: its address, shape and strides, with checks that say what is wrong.
//
// torch (from 2.9 or so) offers a C table for this, found at `__dlpack_c_exchange_api__` of the
// type, which takes some 50 ns; other arrays go through `__dlpack__` and nanobind, about 2 us.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

namespace hasten {

namespace nb = nanobind;

// The stable part of DLPack's exchange table (DLPack 1.2 and later).
struct ExchangeApi {
    struct {
        uint32_t major, minor;
    } version;
    void* previous;
    void* allocate;
    void* managed_from_object;
    void* object_from_managed;
    int (*view_of_object)(void* object, nb::dlpack::dltensor* out);
    void* current_stream;
};

inline const ExchangeApi* exchange_api(PyTypeObject* type) {
    struct Entry {
        PyTypeObject* type;
        const ExchangeApi* api;
    };
    static Entry known[4];  // guarded by the GIL; the types live as long as the process
    static int count = 0;
    for (int i = 0; i < count; i++)
        if (known[i].type == type) return known[i].api;
    const ExchangeApi* api = nullptr;
    PyObject* capsule = PyObject_GetAttrString((PyObject*)type, "__dlpack_c_exchange_api__");
    if (capsule) {
        api = (const ExchangeApi*)PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        if (api && api->version.major != 1) api = nullptr;
        Py_DECREF(capsule);
    }
    PyErr_Clear();
    if (count < 4) {
        Py_INCREF(type);
        known[count++] = {type, api};
    }
    return api;
}

enum class Type { f32, f64, bf16, f16, i8, u8, i32, i64, u64, other };

inline const char* type_name(Type type) {
    switch (type) {
        case Type::f32: return "float32";
        case Type::f64: return "float64";
        case Type::bf16: return "bfloat16";
        case Type::f16: return "float16";
        case Type::i8: return "int8";
        case Type::u8: return "uint8";
        case Type::i32: return "int32";
        case Type::i64: return "int64";
        case Type::u64: return "uint64";
        default: return "another type";
    }
}

class Tensor {
  public:
    Tensor(const char* name, nb::handle object) : name_(name) {
        nb::dlpack::dltensor view;
        if (const ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
            if (api->view_of_object(object.ptr(), &view)) throw nb::python_error();
            data_ = (char*)view.data + view.byte_offset;
            take(view.ndim, view.shape, view.strides, view.dtype);
            if (view.device.device_type != 1) fail_type("is not on the CPU");
        } else {
            if (!nb::try_cast(object, holder_))
                throw nb::type_error((std::string(name_) + " is not an array on the CPU").c_str());
            data_ = holder_.data();
            take(int(holder_.ndim()), holder_.shape_ptr(), holder_.stride_ptr(), holder_.dtype());
        }
    }

    Tensor& is(Type type) {
        if (type_ != type)
            fail_type("is " + std::string(type_name(type_)) + ", not " + type_name(type));
        return *this;
    }

    Tensor& has_dims(int ndim) {
        if (ndim_ != ndim)
            fail("has shape " + shape_text() + ", not " + std::to_string(ndim) + " dimensions");
        return *this;
    }

    // -1 leaves a dimension free
    Tensor& has_shape(std::initializer_list<int64_t> shape) {
        bool same = int(shape.size()) == ndim_;
        int i = 0;
        for (int64_t size : shape) {
            same = same && (size < 0 || size == shape_[i]);
            i++;
        }
        if (!same) {
            std::string text = "[";
            for (int64_t size : shape)
                text += (text.size() > 1 ? ", " : "") + (size < 0 ? "*" : std::to_string(size));
            fail("has shape " + shape_text() + ", not " + text + "]");
        }
        return *this;
    }

    // the dimensions from `from` on lie in memory without gaps
    Tensor& contiguous(int from = 0) {
        int64_t expected = 1;
        for (int i = ndim_ - 1; i >= from; i--) {
            if (shape_[i] != 1 && stride_[i] != expected && size() > 0)
                fail("is not contiguous" + (from ? " from dimension " + std::to_string(from) : ""));
            expected *= shape_[i];
        }
        return *this;
    }

    [[noreturn]] void fail(const std::string& what) const {
        throw nb::value_error((std::string(name_) + " " + what).c_str());
    }
    [[noreturn]] void fail_type(const std::string& what) const {
        throw nb::type_error((std::string(name_) + " " + what).c_str());
    }

    Type type() const { return type_; }
    int ndim() const { return ndim_; }
    int64_t shape(int i) const { return shape_[i]; }
    int64_t stride(int i) const { return stride_[i]; }
    int64_t size() const {
        int64_t n = 1;
        for (int i = 0; i < ndim_; i++) n *= shape_[i];
        return n;
    }
    template <class T>
    T* as() const {
        return (T*)data_;
    }
    float* floats() const { return (float*)data_; }
    std::string shape_text() const {
        std::string text = "[";
        for (int i = 0; i < ndim_; i++) text += (i ? ", " : "") + std::to_string(shape_[i]);
        return text + "]";
    }

  private:
    void take(int ndim, const int64_t* shape, const int64_t* stride, nb::dlpack::dtype type) {
        if (ndim > 8) fail("has more than 8 dimensions");
        ndim_ = ndim;
        int64_t step = 1;
        for (int i = ndim - 1; i >= 0; i--) {
            shape_[i] = shape[i];
            stride_[i] = stride ? stride[i] : step;
            step *= shape[i];
        }
        const auto code = nb::dlpack::dtype_code(type.code);
        if (type.lanes != 1) return;
        if (code == nb::dlpack::dtype_code::Float && type.bits == 32) type_ = Type::f32;
        if (code == nb::dlpack::dtype_code::Float && type.bits == 64) type_ = Type::f64;
        if (code == nb::dlpack::dtype_code::Float && type.bits == 16) type_ = Type::f16;
        if (code == nb::dlpack::dtype_code::Bfloat && type.bits == 16) type_ = Type::bf16;
        if (code == nb::dlpack::dtype_code::Int && type.bits == 8) type_ = Type::i8;
        if (code == nb::dlpack::dtype_code::UInt && type.bits == 8) type_ = Type::u8;
        if (code == nb::dlpack::dtype_code::Int && type.bits == 32) type_ = Type::i32;
        if (code == nb::dlpack::dtype_code::Int && type.bits == 64) type_ = Type::i64;
        if (code == nb::dlpack::dtype_code::UInt && type.bits == 64) type_ = Type::u64;
    }

    const char* name_;
    void* data_ = nullptr;
    int ndim_ = 0;
    int64_t shape_[8], stride_[8];
    Type type_ = Type::other;
    nb::ndarray<nb::device::cpu> holder_;
};

}  // namespace hasten
