//! The index.

use std::collections::HashSet;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyTuple};

use crate::events::Event;
use crate::index::{self, Name};
use crate::ledger::Limits;
use crate::matching::{Run, Runs};
use crate::prompt::Asked;
use crate::python::events::{Batch, Bytes, list_of};
use crate::python::prompt::Prompt;
use crate::wire::decode_batch;

/// The index in this process, in Rust. `indexer.native` puts the interpreter's face on it.
#[pyclass(frozen, module = "indexer._native")]
pub struct Index {
    index: index::Index,
    make_run: Py<PyAny>,
    make_holding: Py<PyAny>,
    make_status: Py<PyAny>,
}

#[pymethods]
impl Index {
    /// `limits` is `indexer.Limits`; the others make a `Run`, a `Holding` and a `SourceStatus`.
    #[new]
    fn new(
        limits: &Bound<'_, PyAny>,
        make_run: Py<PyAny>,
        make_holding: Py<PyAny>,
        make_status: Py<PyAny>,
    ) -> PyResult<Self> {
        let limits = Limits {
            max_sources: limits.getattr("max_sources")?.extract()?,
            max_slots_per_source: limits.getattr("max_slots_per_source")?.extract()?,
            parked_blocks: limits.getattr("parked_blocks")?.extract()?,
            remembered_blocks: limits.getattr("remembered_blocks")?.extract()?,
            block_sizes: limits.getattr("block_sizes")?.extract()?,
            silent_tier_ttl_s: limits.getattr("silent_tier_ttl_s")?.extract()?,
            max_bytes: limits.getattr("max_bytes")?.extract()?,
        };
        Ok(Self { index: index::Index::new(limits), make_run, make_holding, make_status })
    }

    /// Begins to follow a source; says whether it is new, None where too many are followed.
    fn register(
        &self,
        source: &Bound<'_, PyTuple>,
        model: &str,
        counted: bool,
        fleet_wide: bool,
    ) -> PyResult<Option<bool>> {
        let label = source.clone().unbind();
        Ok(self.index.register(name_of(source)?, model, counted, fleet_wide, || Box::new(label)).ok())
    }

    /// Decodes payload frames, all in one go.
    #[staticmethod]
    fn decode_batches<'py>(py: Python<'py>, payloads: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
        let payloads = Bytes::all_of(payloads)?;
        let decoded = py.detach(|| payloads.iter().map(|payload| decode_batch(payload.as_slice())).collect());
        list_of(py, decoded)
    }

    /// Decodes and applies payload frames up to the first that is more than events to apply; gives how many, their
    /// events, and the rest as `decode_batches` does.
    fn apply_payloads<'py>(
        &self,
        source: &Bound<'py, PyTuple>,
        payloads: &Bound<'py, PyAny>,
        first_seq: u64,
    ) -> PyResult<(usize, usize, Bound<'py, PyList>)> {
        let (py, name, payloads) = (source.py(), name_of(source)?, Bytes::all_of(payloads)?);
        let slices = payloads.iter().map(Bytes::as_slice);
        let done = py.detach(|| self.index.apply_payloads(&name, slices, first_seq));
        Ok((done.payloads, done.events, list_of(py, done.rest)?))
    }

    /// Applies batches in order, decoded ones or events as `indexer.events` has them; says no where the source is not
    /// followed.
    fn apply(&self, source: &Bound<'_, PyTuple>, batches: &Bound<'_, PyAny>, last_seq: Option<u64>) -> PyResult<bool> {
        let name = name_of(source)?;
        let batches: Vec<Bound<'_, Batch>> =
            batches.try_iter()?.map(|batch| batch_of(batch?)).collect::<PyResult<_>>()?;
        let events: Vec<&[Event]> = batches.iter().map(|batch| &batch.get().batch.events[..]).collect();
        Ok(source.py().detach(|| self.index.apply(&name, events, last_seq)).is_ok())
    }

    /// Forgets everything a source holds; says no where it is not followed.
    fn restart(&self, source: &Bound<'_, PyTuple>) -> PyResult<bool> {
        let name = name_of(source)?;
        Ok(source.py().detach(|| self.index.restart(&name)).is_ok())
    }

    /// Says why answers may be wrong; says no where the source is not followed.
    fn degrade(&self, source: &Bound<'_, PyTuple>, reason: &str) -> PyResult<bool> {
        let name = name_of(source)?;
        Ok(source.py().detach(|| self.index.degrade(&name, reason)).is_ok())
    }

    /// Counts one copy of each of these blocks; None where the source is not followed, no where it has cache groups.
    fn recount(&self, source: &Bound<'_, PyTuple>, keys: Vec<u64>) -> PyResult<Option<bool>> {
        let name = name_of(source)?;
        Ok(source.py().detach(|| self.index.recount(&name, &keys)).ok())
    }

    /// Counts the copies that `recount` would take; 0 where the source is not followed.
    fn surplus(&self, source: &Bound<'_, PyTuple>, keys: Vec<u64>) -> PyResult<usize> {
        let name = name_of(source)?;
        Ok(source.py().detach(|| self.index.surplus(&name, &keys)).unwrap_or(0))
    }

    /// All sources in the order in which they were registered.
    fn followed(&self, py: Python<'_>) -> Vec<Py<PyTuple>> {
        let all = py.detach(|| self.index.followed());
        all.iter().map(|tracked| label_of(py, tracked)).collect()
    }

    /// All that is known of a source as bytes, None where it is not followed.
    fn dump<'py>(&self, source: &Bound<'py, PyTuple>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let (py, name) = (source.py(), name_of(source)?);
        let bytes = py.detach(|| self.index.dump(&name));
        Ok(bytes.ok().map(|bytes| PyBytes::new(py, &bytes)))
    }

    /// Follows a source from where it was when it was dumped; says what is wrong with the bytes, "" where nothing is.
    fn load(&self, section: &Bound<'_, PyBytes>, source: &Bound<'_, PyTuple>) -> PyResult<String> {
        let (bytes, name, label) = (section.as_bytes(), name_of(source)?, source.clone().unbind());
        let loaded = source.py().detach(|| self.index.load(bytes, &name, || Box::new(label)));
        Ok(loaded.err().unwrap_or_default())
    }

    /// Places what waits in shared caches and is known by now.
    fn settle(&self, py: Python<'_>) {
        py.detach(|| self.index.settle_shared());
    }

    fn expire(&self, py: Python<'_>) {
        py.detach(|| self.index.expire());
    }

    fn forget(&self, py: Python<'_>, pod: &str) {
        py.detach(|| self.index.forget(pod));
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.index.close());
    }

    /// What each source holds of a prompt.
    fn r#match<'py>(
        &self,
        py: Python<'py>,
        prompt: &Bound<'py, Prompt>,
        pods: Option<Vec<String>>,
        block_size: Option<i64>,
        everyone: bool,
    ) -> PyResult<Bound<'py, PyList>> {
        let prompt = prompt.get();
        let block_size = block_size.map(|size| u32::try_from(size).unwrap_or(0)); // nobody has blocks of 0 tokens
        let pods: Option<HashSet<String>> = pods.map(|pods| pods.into_iter().collect());
        let holdings = prompt.with(py, |tokens, keys| {
            self.index.holdings(&mut Asked { tokens, keys }, pods.as_ref(), block_size, everyone)
        });
        let mut runs = RunsMaker { make_run: self.make_run.bind(py), nowhere: PyTuple::empty(py), last: None };
        let exact = PyString::intern(py, "");
        let make_holding = self.make_holding.bind(py);
        let list = PyList::empty(py);
        for holding in holdings {
            let found = holding.found;
            let degraded = holding.tracked.degraded();
            let degraded = degraded.map_or_else(|| exact.clone(), |reason| PyString::new(py, &reason));
            let source = label_of(py, &holding.tracked);
            let runs = runs.make(found.tokens, &found.runs)?;
            list.append(make_holding.call1((source, found.tokens, found.reusable, runs, degraded))?)?;
        }
        Ok(list)
    }

    fn block_size(&self, model: &str) -> Option<u32> {
        self.index.block_size(model)
    }

    fn sources<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let all = py.detach(|| self.index.sources());
        let list = PyList::empty(py);
        for status in all {
            let tiers = PyDict::new(py);
            for (tier, blocks) in &status.tiers {
                tiers.set_item(tier, blocks)?;
            }
            let blocks: usize = status.tiers.iter().map(|(_, blocks)| blocks).sum();
            list.append(self.make_status.bind(py).call1((
                label_of(py, &status.tracked),
                &*status.tracked.model,
                status.incarnation,
                blocks,
                tiers,
                status.block_sizes,
                status.degraded.as_deref().unwrap_or(""),
                status.degraded_since,
                status.tracked.fleet_wide,
                status.last_seq,
            ))?)?;
        }
        Ok(list)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = PyDict::new(py);
        for (name, value) in self.index.counters.all().into_iter().chain(py.detach(|| self.index.gauges())) {
            stats.set_item(name, value)?;
        }
        Ok(stats)
    }

    /// Blocks that somebody holds, and sources that are followed.
    fn counts(&self, py: Python<'_>) -> (usize, usize) {
        py.detach(|| self.index.counts())
    }
}

fn batch_of(batch: Bound<'_, PyAny>) -> PyResult<Bound<'_, Batch>> {
    match batch.cast_into::<Batch>() {
        Ok(batch) => Ok(batch),
        Err(other) => {
            let events = other.into_inner();
            Bound::new(events.py(), Batch::new(&events)?)
        }
    }
}

fn name_of(source: &Bound<'_, PyTuple>) -> PyResult<Name> {
    let (pod, rank): (String, u64) = source.extract()?;
    Ok((pod.into(), rank))
}

fn label_of(py: Python<'_>, tracked: &index::Tracked) -> Py<PyTuple> {
    match tracked.label.downcast_ref::<Py<PyTuple>>() {
        Some(label) => label.clone_ref(py),
        None => unreachable!("`register` above gave every source its tuple"),
    }
}

/// Makes tuples of runs; most sources of an answer share one.
struct RunsMaker<'a, 'py> {
    make_run: &'a Bound<'py, PyAny>,
    nowhere: Bound<'py, PyTuple>,
    last: Option<(u64, Arc<str>, Bound<'py, PyTuple>)>,
}

impl<'py> RunsMaker<'_, 'py> {
    fn make(&mut self, tokens: u64, runs: &Runs) -> PyResult<Bound<'py, PyTuple>> {
        match runs {
            Runs::Nowhere => Ok(self.nowhere.clone()),
            Runs::One(medium) => {
                if let Some((known, on, made)) = &self.last
                    && *known == tokens
                    && on == medium
                {
                    return Ok(made.clone());
                }
                let made = self.tuple(&[Run { tokens, media: vec![medium.clone()] }])?;
                self.last = Some((tokens, medium.clone(), made.clone()));
                Ok(made)
            }
            Runs::Many(runs) => self.tuple(runs),
        }
    }

    fn tuple(&self, runs: &[Run]) -> PyResult<Bound<'py, PyTuple>> {
        let py = self.make_run.py();
        let made = runs.iter().map(|run| {
            let media = PyTuple::new(py, run.media.iter().map(|medium| &**medium))?;
            self.make_run.call1((run.tokens, media))
        });
        PyTuple::new(py, made.collect::<PyResult<Vec<_>>>()?)
    }
}
