// The Python module psyche._native: tensors come in through DLPack, payloads through the buffer protocol.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

#include "operations.h"

namespace nb = nanobind;

namespace psyche {
namespace {

using Values = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableValues = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The bytes of an object that has some, for as long as this lives.
class Bytes {
 public:
  explicit Bytes(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  const u8* data() const { return static_cast<const u8*>(view_.buf); }
  i64 size() const { return view_.len; }

 private:
  Py_buffer view_;
};

// A bytes object to be filled before anyone sees it.
nb::bytes uninitialised(i64 size) {
  PyObject* made = PyBytes_FromStringAndSize(nullptr, size);
  if (!made) throw nb::python_error();
  return nb::steal<nb::bytes>(made);
}
u8* writable(nb::bytes& bytes) { return reinterpret_cast<u8*>(PyBytes_AS_STRING(bytes.ptr())); }

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

const Level& level_of(const std::string& name) {
  const Level* level = find_level(name);
  require(level != nullptr, "this machine or build does not have that instruction set");
  return *level;
}

std::optional<std::string> reason_of(u32 faults) {
  if (faults == 0) return std::nullopt;
  return std::string(reason(faults));
}

class Codec {
 public:
  Codec(const std::string& name, const std::string& level) : ranges_(name, level_of(level)) {
    require(ranges_.valid(), "no codec of that name is native");
  }

  nb::object encode(nb::handle header, const Values& base, const Values& local, std::optional<MutableValues> residual,
                    float beta, int threads) const {
    const i64 count = whole(static_cast<i64>(base.size()));
    require(local.size() == base.size() && (!residual || residual->size() == base.size()), "ranges of unequal sizes");
    const Bytes head(header);
    nb::bytes payload = uninitialised(head.size() + ranges_.body_bytes(count));
    u8* out = writable(payload);
    __builtin_memcpy(out, head.data(), static_cast<std::size_t>(head.size()));
    const Input in{base.data(), local.data(), residual ? residual->data() : nullptr, beta};
    i64 bad;
    {
      nb::gil_scoped_release release;
      bad = ranges_.encode(in, out + head.size(), count, threads);
    }
    return bad < 0 ? nb::object(payload) : nb::object(nb::int_(bad));
  }

  std::optional<std::string> check(nb::handle body, i64 count, int threads) const {
    const Bytes bytes(body);
    require_body(bytes, count);
    nb::gil_scoped_release release;
    return reason_of(ranges_.check(bytes.data(), count, threads));
  }

  std::optional<std::string> decode_add(nb::handle body, float weight, const MutableValues& out, int threads) const {
    const i64 count = whole(static_cast<i64>(out.size()));
    const Bytes bytes(body);
    require_body(bytes, count);
    nb::gil_scoped_release release;
    return reason_of(ranges_.decode_add(bytes.data(), count, weight, out.data(), threads));
  }

  double squared_norm(nb::handle body, i64 count) const {
    const Bytes bytes(body);
    require_body(bytes, count);
    nb::gil_scoped_release release;
    return ranges_.squared_norm(bytes.data(), count);
  }

 private:
  static i64 whole(i64 count) {
    require(count >= 0 && count % CHUNK == 0, "ranges are of whole chunks of 4096 values");
    return count;
  }
  void require_body(const Bytes& bytes, i64 count) const {
    require(bytes.size() == ranges_.body_bytes(whole(count)), "a body of the wrong size");
  }

  RangeCodec ranges_;
};

void step(const MutableValues& theta, const MutableValues& momentum, const Values& gradient, float lr, float mu,
          std::optional<MutableValues> local, int threads, const std::string& level) {
  require(momentum.size() == theta.size() && gradient.size() == theta.size() &&
              (!local || local->size() == theta.size()),
          "ranges of unequal sizes");
  const Level& used = level_of(level);
  nb::gil_scoped_release release;
  outer_step(used, theta.data(), momentum.data(), gradient.data(), local ? local->data() : nullptr,
             static_cast<i64>(theta.size()), lr, mu, threads);
}

void require_kept(int kept) {
  require(kept == 64 || kept == 256 || kept == 512, "no such density");
}

std::optional<nb::bytes> compressed(nb::handle body, int kept) {
  require_kept(kept);
  const Bytes bytes(body);
  const i64 chunk = TopK2Layout::of(kept).bytes;
  require(bytes.size() % chunk == 0, "a body of the wrong size");
  if (bytes.size() == 0) return std::nullopt;
  std::vector<u8> out(static_cast<std::size_t>(bytes.size() - 1));  // as large as stored is not worth it
  i64 size;
  {
    nb::gil_scoped_release release;
    size = compress(kept, bytes.data(), bytes.size() / chunk, out.data(), bytes.size() - 1);
  }
  if (size < 0) return std::nullopt;
  return nb::bytes(out.data(), static_cast<std::size_t>(size));
}

std::optional<nb::bytes> expanded(nb::handle header, nb::handle stream, int kept, i64 chunks) {
  require_kept(kept);
  require(chunks >= 0, "a negative number of chunks");
  const Bytes head(header), data(stream);
  nb::bytes payload = uninitialised(head.size() + chunks * TopK2Layout::of(kept).bytes);
  u8* out = writable(payload);
  __builtin_memcpy(out, head.data(), static_cast<std::size_t>(head.size()));
  bool sound;
  {
    nb::gil_scoped_release release;
    sound = expand(kept, data.data(), data.size(), chunks, out + head.size());
  }
  if (!sound) return std::nullopt;
  return payload;
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Level* level : available_levels()) names.emplace_back(level->name);
  return names;
}

}  // namespace
}  // namespace psyche

NB_MODULE(_native, m) {
  using namespace psyche;
  using namespace nb::literals;
  m.def("levels", &levels);
  nb::class_<Codec>(m, "Codec")
      .def(nb::init<const std::string&, const std::string&>(), "name"_a, "level"_a)
      .def("encode", &Codec::encode, "header"_a, "base"_a.noconvert(), "local"_a.noconvert(),
           "residual"_a.noconvert().none(), "beta"_a, "threads"_a)
      .def("check", &Codec::check, "body"_a, "count"_a, "threads"_a)
      .def("decode_add", &Codec::decode_add, "body"_a, "weight"_a, "out"_a.noconvert(), "threads"_a)
      .def("squared_norm", &Codec::squared_norm, "body"_a, "count"_a);
  m.def("outer_step", &step, "theta"_a.noconvert(), "momentum"_a.noconvert(), "gradient"_a.noconvert(), "lr"_a, "mu"_a,
        "local"_a.noconvert().none(), "threads"_a, "level"_a);
  m.def("compress", &compressed, "body"_a, "kept"_a);
  m.def("expand", &expanded, "header"_a, "stream"_a, "kept"_a, "chunks"_a);
}
