// The part without torch: what this build is, and td_coef_math.h and td_loss_math.h over NumPy
// arrays, so that a test compares the formulas themselves.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "td_coef_math.h"
#include "td_loss_math.h"

namespace py = pybind11;
using namespace tdkern;

namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

py::dict build() {
  py::dict facts;
  facts["compiler"] = TDKERN_COMPILER;
  facts["cpu_instruction_sets"] = TDKERN_CPU_ISAS;
  facts["cuda"] = TDKERN_CUDA_VERSION;
  facts["cuda_architectures"] = TDKERN_CUDA_ARCHS;
  facts["torch_stable_abi"] = "2.10";
  return facts;
}

double two_moment_A(
    double alpha_t, double sigma_t, double alpha_tau, double sigma_tau, double eta) {
  double A, kappa;
  two_moment(alpha_t, sigma_t, alpha_tau, sigma_tau, eta, &A, &kappa);
  return A;
}

double two_moment_kappa(
    double alpha_t, double sigma_t, double alpha_tau, double sigma_tau, double eta) {
  double A, kappa;
  two_moment(alpha_t, sigma_t, alpha_tau, sigma_tau, eta, &A, &kappa);
  return kappa;
}

using Element =
    double (*)(const Sample<double>&, double, double, double, double, double, double&, double&);

template <Norm BASE>
Element element_of(bool consistency) {
  if (consistency) return td_element<true, BASE, true, double, double>;
  return td_element<true, BASE, false, double, double>;
}

// One sample: (delta^2 mean, base^2 or |base| mean, dF), unweighted sums over n elements with
// coef's eight numbers.
std::tuple<double, double, Doubles> td_sample(Doubles coef,
                                              Doubles F,
                                              Doubles F_p,
                                              Doubles x0,
                                              Doubles x_t,
                                              Doubles x_tp,
                                              bool consistency,
                                              bool l1) {
  const py::ssize_t n = F.size();
  if (coef.size() != 8)
    throw py::value_error("td_sample: coef must have 8 numbers, got " +
                          std::to_string(coef.size()));
  for (const Doubles* array : {&F_p, &x0, &x_t, &x_tp})
    if (array->size() != n) throw py::value_error("td_sample: every array must have F's size");
  const auto& row = *reinterpret_cast<const Coef*>(coef.data());
  const Sample<double> sample =
      make_sample<double>(l1 ? Norm::l1 : Norm::l2, row, n, {1, 1}, true, true);
  const auto element = l1 ? element_of<Norm::l1>(consistency) : element_of<Norm::l2>(consistency);
  Doubles dF(n);
  double td = 0, base = 0;
  for (py::ssize_t i = 0; i < n; ++i) {
    const double args[] = {F.data()[i], F_p.data()[i], x0.data()[i], x_t.data()[i], x_tp.data()[i]};
    dF.mutable_data()[i] = element(sample, args[0], args[1], args[2], args[3], args[4], td, base);
  }
  return {td / n, base / n, dF};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of tdkern and the formulas of csrc/include over NumPy arrays; no torch.";
  m.def("build", &build, "What this build was made with and for.");
  m.def("two_moment_A", py::vectorize(two_moment_A), py::arg("alpha_t"), py::arg("sigma_t"),
        py::arg("alpha_tau"), py::arg("sigma_tau"), py::arg("eta"));
  m.def("two_moment_kappa", py::vectorize(two_moment_kappa), py::arg("alpha_t"), py::arg("sigma_t"),
        py::arg("alpha_tau"), py::arg("sigma_tau"), py::arg("eta"));
  m.def("td_sample", &td_sample,
        "mean(delta^2), mean(base^2) or mean(|base|), and dF of one sample.", py::arg("coef"),
        py::arg("F"), py::arg("F_p"), py::arg("x0"), py::arg("x_t"), py::arg("x_tp"),
        py::arg("consistency"), py::arg("l1"));
}
