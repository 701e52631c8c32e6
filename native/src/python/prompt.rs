//! `Prompt` and `block_keys`.

use parking_lot::Mutex;
use pyo3::IntoPyObjectExt;
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyList, PyTuple, PyType};

use crate::events::Lora;
use crate::json;
use crate::keys::ImageItem;
use crate::prompt::PromptKeys;
use crate::python::events::{Bytes, lora_of};

/// The tokens of one prompt with all that decides which cached blocks fit it.
#[pyclass(frozen, module = "indexer._native")]
pub struct Prompt {
    state: Mutex<State>,
    images: Py<PyTuple>,
}

struct State {
    tokens: Tokens,
    keys: PromptKeys,
}

enum Tokens {
    Shared(PyBuffer<u32>),
    Own(Vec<u32>),
}

impl Tokens {
    /// Takes any form of token ids; what is no buffer of uint32 is packed by `indexer.keys`, which also says what is
    /// wrong with it.
    fn of(token_ids: &Bound<'_, PyAny>) -> PyResult<Self> {
        static PACK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        if let Ok(buffer) = PyBuffer::<u32>::get(token_ids)
            && buffer.dimensions() == 1
            && buffer.is_c_contiguous()
            && !matches!(buffer.format().to_bytes().first(), Some(b'>' | b'!'))
        {
            return Ok(Self::Shared(buffer));
        }
        let py = token_ids.py();
        let packed = PACK.import(py, "indexer.keys", "token_buffer")?.call1((token_ids,))?;
        let bytes = PyBuffer::<u8>::get(&packed)?;
        if bytes.buf_ptr().cast::<u32>().is_aligned() {
            let words = packed.call_method1("cast", ("I",))?;
            return Ok(Self::Shared(PyBuffer::get(&words)?));
        }
        let words = bytes.to_vec(py)?;
        Ok(Self::Own(
            words.chunks_exact(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]])).collect(),
        ))
    }

    fn as_slice(&self) -> &[u32] {
        match self {
            Self::Own(tokens) => tokens,
            // SAFETY: the buffer is contiguous, aligned for u32 (checked by `PyBuffer::get`) and exported for as long as
            // `self` lives, so its memory stays. Who writes into it while it is being read, as with any call that lets
            // the interpreter go on, gets the keys of what he wrote.
            Self::Shared(buffer) if buffer.item_count() > 0 => unsafe {
                std::slice::from_raw_parts(buffer.buf_ptr().cast::<u32>(), buffer.item_count())
            },
            Self::Shared(_) => &[],
        }
    }
}

/// Tokens of a prompt up to which all work on it is done with the interpreter lock: some ten microseconds.
const AT_ONCE_TOKENS: usize = 4_096;

impl Prompt {
    /// Does some work on the tokens and keys, without the interpreter lock where there is much of it. To let that go and
    /// have it back costs more than a short prompt's keys where other threads wait for it.
    pub fn with<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&[u32], &mut PromptKeys) -> T + Send) -> T {
        if let Some(mut state) = self.state.try_lock()
            && state.tokens.as_slice().len() <= AT_ONCE_TOKENS
        {
            let State { tokens, keys } = &mut *state;
            return work(tokens.as_slice(), keys);
        }
        py.detach(|| {
            let State { tokens, keys } = &mut *self.state.lock();
            work(tokens.as_slice(), keys)
        })
    }

    /// Takes a look, however long the prompt is.
    fn look<T: Send>(&self, py: Python<'_>, look: impl FnOnce(&State) -> T + Send) -> T {
        match self.state.try_lock() {
            Some(state) => look(&state),
            None => py.detach(|| look(&self.state.lock())),
        }
    }
}

#[pymethods]
impl Prompt {
    #[new]
    #[pyo3(signature = (token_ids, model, *, lora_name = None, cache_salt = None, mm_items = None))]
    fn new(
        token_ids: &Bound<'_, PyAny>,
        model: &str,
        lora_name: Option<&Bound<'_, PyAny>>,
        cache_salt: Option<&str>,
        mm_items: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let py = token_ids.py();
        let tokens = Tokens::of(token_ids)?;
        // engines treat an empty name or salt as none
        let lora =
            lora_name.map_or(Ok(None), lora_of)?.filter(|lora| !matches!(lora, Lora::Name(name) if name.is_empty()));
        let (images, tuple) = match mm_items {
            None => (Vec::new(), PyTuple::empty(py)),
            Some(items) => {
                let items: Vec<Bound<'_, PyAny>> = items.try_iter()?.collect::<PyResult<_>>()?;
                (items.iter().map(image_of).collect::<PyResult<_>>()?, PyTuple::new(py, items)?)
            }
        };
        let salt = cache_salt.filter(|salt| !salt.is_empty());
        let keys = PromptKeys::new(model.into(), lora, salt.map(Into::into), images);
        Ok(Self { state: Mutex::new(State { tokens, keys }), images: tuple.unbind() })
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let model = self.model(py).into_bound_py_any(py)?.repr()?;
        Ok(format!("Prompt({} tokens, model={model})", self.length(py)))
    }

    #[getter]
    fn length(&self, py: Python<'_>) -> usize {
        self.look(py, |state| state.tokens.as_slice().len())
    }

    #[getter]
    fn model(&self, py: Python<'_>) -> String {
        self.look(py, |state| state.keys.model.to_string())
    }

    #[getter]
    fn images(&self, py: Python<'_>) -> Py<PyTuple> {
        self.images.clone_ref(py)
    }

    /// Gives at least the first `upto` keys for blocks of `block_size` tokens, fewer where the prompt ends before.
    #[pyo3(signature = (block_size, upto, *, bare = false))]
    fn keys<'py>(&self, py: Python<'py>, block_size: i64, upto: usize, bare: bool) -> PyResult<Bound<'py, PyList>> {
        let block_size = size_of(py, block_size)?;
        let keys = self.with(py, |tokens, keys| keys.keys(tokens, block_size, upto, bare).to_vec());
        PyList::new(py, keys)
    }

    /// Computes the keys of all whole blocks of `block_size` tokens ahead of a question; gives their number.
    fn prepare(&self, py: Python<'_>, block_size: i64) -> PyResult<usize> {
        let block_size = size_of(py, block_size)?;
        Ok(self.with(py, |tokens, keys| keys.keys(tokens, block_size, usize::MAX, false).len()))
    }

    /// Adds tokens at the end. Keys of blocks that were whole before are kept.
    fn extend(&self, token_ids: &Bound<'_, PyAny>) -> PyResult<()> {
        let more = Tokens::of(token_ids)?;
        token_ids.py().detach(|| {
            let mut state = self.state.lock();
            let mut tokens = match std::mem::replace(&mut state.tokens, Tokens::Own(Vec::new())) {
                Tokens::Own(tokens) => tokens,
                shared @ Tokens::Shared(_) => shared.as_slice().to_vec(),
            };
            tokens.extend_from_slice(more.as_slice());
            state.tokens = Tokens::Own(tokens);
        });
        Ok(())
    }
}

fn image_of(item: &Bound<'_, PyAny>) -> PyResult<ImageItem> {
    let tuple = item.cast::<PyList>().map(|list| list.to_tuple().into_any());
    match tuple.as_ref().unwrap_or(item).extract::<(String, u64, u64)>() {
        Ok((name, first, length)) => Ok(ImageItem { name, first, length }),
        Err(_) => {
            let message =
                format!("mm_items: expected (identifier, first token, number of tokens), got {}", item.repr()?);
            Err(invalid_question(item.py(), message))
        }
    }
}

/// A block size; one beyond `u32` is longer than any prompt, as is the largest of them.
fn size_of(py: Python<'_>, block_size: i64) -> PyResult<u32> {
    if block_size < 1 {
        return Err(invalid_question(py, format!("block_size: expected at least 1, got {block_size}")));
    }
    Ok(u32::try_from(block_size).unwrap_or(u32::MAX))
}

/// The package's own exception for what cannot be used as given.
fn invalid_question(py: Python<'_>, message: String) -> PyErr {
    static KIND: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    match KIND.import(py, "indexer.errors", "InvalidQuestion") {
        Ok(kind) => PyErr::from_type(kind.clone(), message),
        Err(error) => error,
    }
}

/// Gives the key of every whole block of a prompt. The block size is checked by the caller.
#[pyfunction]
pub fn block_keys<'py>(prompt: &Bound<'py, Prompt>, block_size: u32) -> PyResult<Bound<'py, PyList>> {
    let (py, prompt) = (prompt.py(), prompt.get());
    let keys = prompt.with(py, |tokens, keys| keys.keys(tokens, block_size, usize::MAX, false).to_vec());
    PyList::new(py, keys)
}

/// Reads a JSON array of token ids into little-endian uint32; none for what only a whole JSON reader can judge.
#[pyfunction]
pub fn token_ids_of_json<'py>(text: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyBytes>>> {
    let Some(ids) = json::token_ids(Bytes::of(text)?.as_slice()) else { return Ok(None) };
    let bytes = PyBytes::new_with(text.py(), 4 * ids.len(), |out| {
        for (place, id) in out.chunks_exact_mut(4).zip(&ids) {
            place.copy_from_slice(&id.to_le_bytes());
        }
        Ok(())
    })?;
    Ok(Some(bytes))
}
