//! Payloads and events on their way in.

use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyList, PyMappingProxy, PyString};

use crate::events::{self, EngineHash, Event, Lora, Removed, Stored};
use crate::wire::DecodeError;

/// The events of one message, ready for an index.
#[pyclass(frozen, module = "indexer._native")]
pub struct Batch {
    pub batch: events::Batch,
}

#[pymethods]
impl Batch {
    /// Takes events as `indexer.events` has them.
    #[new]
    pub fn new(events: &Bound<'_, PyAny>) -> PyResult<Self> {
        let events = events.try_iter()?.map(|event| event_of(&event?)).collect::<PyResult<_>>()?;
        Ok(Self { batch: events::Batch { events, ..Default::default() } })
    }

    fn __len__(&self) -> usize {
        self.batch.events.len()
    }

    /// Whether both hold the same events.
    fn __eq__(&self, other: &Self) -> bool {
        self.batch.events == other.batch.events
    }

    fn __repr__(&self) -> String {
        format!("Batch({} events, rank={:?})", self.batch.events.len(), self.batch.rank)
    }

    #[getter]
    fn ts(&self) -> f64 {
        self.batch.ts
    }

    #[getter]
    fn rank(&self) -> Option<u32> {
        self.batch.rank
    }

    #[getter]
    fn events<'py>(this: &Bound<'py, Self>) -> Bound<'py, Self> {
        this.clone()
    }

    #[getter]
    fn discards<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyMappingProxy>> {
        static NONE: PyOnceLock<Py<PyMappingProxy>> = PyOnceLock::new();
        if self.batch.discards.is_empty() {
            let none = || PyMappingProxy::new(py, PyDict::new(py).as_mapping()).unbind();
            return Ok(NONE.get_or_init(py, none).bind(py).clone());
        }
        let discards = PyDict::new(py);
        for (reason, count) in &self.batch.discards {
            discards.set_item(reason, count)?;
        }
        Ok(PyMappingProxy::new(py, discards.as_mapping()))
    }

    #[getter]
    fn clears(&self) -> bool {
        self.batch.clears()
    }

    #[getter]
    fn model(&self) -> Option<&str> {
        self.batch.events.iter().find_map(|event| match event {
            Event::Stored(stored) => stored.model.as_deref(),
            _ => None,
        })
    }
}

/// What payload frames hold; what is no batch at all gives the reason and a detail instead.
pub fn list_of(py: Python<'_>, decoded: Vec<Result<events::Batch, DecodeError>>) -> PyResult<Bound<'_, PyList>> {
    let list = PyList::empty(py);
    for result in decoded {
        match result {
            Ok(batch) => list.append(Bound::new(py, Batch { batch })?)?,
            Err(error) => list.append((error.reason, error.detail))?,
        }
    }
    Ok(list)
}

/// A payload that stays where it is.
pub enum Bytes {
    Immutable { _owner: Py<PyBytes>, slice: &'static [u8] },
    Buffer(PyBuffer<u8>),
}

impl Bytes {
    pub fn all_of(payloads: &Bound<'_, PyAny>) -> PyResult<Vec<Self>> {
        payloads.try_iter()?.map(|payload| Self::of(&payload?)).collect()
    }

    pub fn of(payload: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(bytes) = payload.cast::<PyBytes>() {
            // SAFETY: bytes objects never change, and the reference beside the slice keeps this one alive.
            let slice = unsafe { std::mem::transmute::<&[u8], &'static [u8]>(bytes.as_bytes()) };
            return Ok(Self::Immutable { _owner: bytes.clone().unbind(), slice });
        }
        let buffer = PyBuffer::get(payload)?;
        if !buffer.is_c_contiguous() {
            return Err(pyo3::exceptions::PyBufferError::new_err("expected contiguous bytes"));
        }
        Ok(Self::Buffer(buffer))
    }

    pub fn as_slice(&self) -> &[u8] {
        match self {
            Self::Immutable { slice, .. } => slice,
            // SAFETY: the buffer is contiguous and exported for as long as `self` lives, so its memory stays. Whoever
            // writes into a payload while it is being decoded gets what he wrote, as with any call that lets the
            // interpreter go on; frames of a socket are nobody's to write.
            Self::Buffer(buffer) => unsafe {
                std::slice::from_raw_parts(buffer.buf_ptr().cast::<u8>(), buffer.len_bytes())
            },
        }
    }
}

fn event_of(event: &Bound<'_, PyAny>) -> PyResult<Event> {
    let name = event.get_type().name()?;
    match name.to_str()? {
        "BlockStored" => stored_of(event).map(Event::Stored),
        "BlockRemoved" => Ok(Event::Removed(Removed {
            block_hashes: hashes_of(&event.getattr("block_hashes")?)?,
            medium: event.getattr("medium")?.extract::<String>()?.into(),
            group: event.getattr("group_idx")?.extract()?,
        })),
        "AllBlocksCleared" => Ok(Event::Cleared),
        other => Err(pyo3::exceptions::PyTypeError::new_err(format!("expected an event, got {other}"))),
    }
}

fn stored_of(event: &Bound<'_, PyAny>) -> PyResult<Stored> {
    let parent = event.getattr("parent_block_hash")?;
    let text = |name: &str| -> PyResult<Option<Box<str>>> {
        Ok(event.getattr(name)?.extract::<Option<String>>()?.map(String::into_boxed_str))
    };
    Ok(Stored {
        block_hashes: hashes_of(&event.getattr("block_hashes")?)?,
        parent: if parent.is_none() { None } else { Some(hash_of(&parent)?) },
        token_ids: tokens_of(&event.getattr("token_ids")?)?,
        block_size: event.getattr("block_size")?.extract()?,
        medium: event.getattr("medium")?.extract::<String>()?.into(),
        group: event.getattr("group_idx")?.extract()?,
        kind: text("kind")?,
        sliding_window: event.getattr("sliding_window")?.extract()?,
        lora: lora_of(&event.getattr("lora")?)?,
        cache_salt: text("cache_salt")?,
        extras: event.getattr("extras")?.extract()?,
        bare_images: event.getattr("bare_images")?.extract()?,
        model: text("model")?,
    })
}

fn tokens_of(token_ids: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    if token_ids.len()? == 0 {
        return Ok(Vec::new()); // an empty array has no memory, and what it gives for its place is not aligned
    }
    PyBuffer::<u32>::get(token_ids)?.to_vec(token_ids.py())
}

fn hashes_of(hashes: &Bound<'_, PyAny>) -> PyResult<Vec<EngineHash>> {
    hashes.try_iter()?.map(|name| hash_of(&name?)).collect()
}

fn hash_of(name: &Bound<'_, PyAny>) -> PyResult<EngineHash> {
    match name.cast::<PyBytes>() {
        Ok(bytes) => Ok(EngineHash::from_bytes(bytes.as_bytes())),
        Err(_) => Ok(EngineHash::from_int(name.extract()?)),
    }
}

/// An adapter's name or number.
pub fn lora_of(lora: &Bound<'_, PyAny>) -> PyResult<Option<Lora>> {
    if lora.is_none() {
        return Ok(None);
    }
    Ok(Some(match lora.cast::<PyString>() {
        Ok(name) => Lora::Name(name.extract::<String>()?.into()),
        Err(_) => match lora.extract::<i64>() {
            Ok(number) => Lora::Number(number.into()),
            Err(_) => Lora::Number(lora.extract::<u64>()?.into()),
        },
    }))
}
