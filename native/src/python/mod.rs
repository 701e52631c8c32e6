//! `indexer._native`: arguments in, answers out, the interpreter lock released in between.

use pyo3::prelude::*;

#[pymodule]
#[pyo3(name = "_native")]
mod native {
    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
