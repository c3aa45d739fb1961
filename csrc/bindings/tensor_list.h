// The same matrix of several experts: equal shapes and types, checked once, at load.
#pragma once

#include <vector>

#include "bindings.h"

namespace hasten {

class TensorList {
  public:
    explicit TensorList(nb::list tensors) : tensors_(tensors) {
        for (nb::handle object : tensors) {
            Tensor tensor("an expert's weight", object);
            tensor.contiguous();
            std::vector<int64_t> shape;
            for (int i = 0; i < tensor.ndim(); i++) shape.push_back(tensor.shape(i));
            if (data_.empty()) type_ = tensor.type(), shape_ = shape;
            if (tensor.type() != type_ || shape != shape_)
                tensor.fail("has another shape or type than the first one's");
            data_.push_back(tensor.as<void>());
        }
    }

    int64_t count() const { return int64_t(data_.size()); }
    Type type() const { return type_; }
    const std::vector<int64_t>& shape() const { return shape_; }
    const void* const* data() const { return data_.data(); }

  private:
    nb::list tensors_;  // keeps them alive
    std::vector<const void*> data_;
    Type type_ = Type::other;
    std::vector<int64_t> shape_;
};

}  // namespace hasten
