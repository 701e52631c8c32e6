//! `indexer._native`: arguments in, answers out, the interpreter lock released in between.

mod events;
mod index;
mod prompt;

use pyo3::prelude::*;

#[pymodule]
#[pyo3(name = "_native")]
mod native {
    use super::*;

    #[pymodule_export]
    use super::events::Batch;
    #[pymodule_export]
    use super::index::Index;
    #[pymodule_export]
    use super::prompt::{Prompt, block_keys, token_ids_of_json};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
