//! From payload bytes to events, for every dialect that engines speak: the twin of `kvevents/wire.py`.
//!
//! A batch is an array `[ts, events, rank?]` or a map. An event is a tagged array (vLLM up to 0.23, older SGLang), a
//! tagged map (vLLM from 0.24, SGLang), an RFC 1527 map (Mooncake), or bytes that hold a packed array (llm-d's storage
//! connector). Unknown keys and extra fields are ignored. A bad event costs that event, never its batch; a broken batch
//! is an error.
//!
//! Everything is read once, from front to back, and what is asked of it later is kept: the Python twin decodes the
//! whole payload before it looks at anything, so bytes that are no msgpack count before all else.

mod event;
mod extras;
mod fields;
mod media;
mod reader;
mod tokens;

use std::fmt;

use crate::events::{Batch, Event};
use event::Draft;
use reader::{Broken, Reader, Value};

pub use event::{MAX_BLOCK_SIZE, MAX_GROUP, MAX_LORA, MAX_TEXT, MAX_WINDOW};
pub use fields::{MAX_HASH_BYTES, MAX_HASHES, MAX_TOKENS};
pub use reader::MAX_DEPTH;

pub const MAX_EVENTS: usize = 65_536;
pub const MAX_RANK: u32 = 65_535;

/// How many events room is made for before any is read.
const ROOM: usize = 4;

/// Timestamps above this are milliseconds: as seconds it would be the year 5138.
const MILLISECONDS: u64 = 100_000_000_000;

/// A payload is no batch of events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeError {
    /// The word it is counted under.
    pub reason: &'static str,
    pub detail: String,
}

impl DecodeError {
    fn new(reason: &'static str, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.detail)
    }
}

impl std::error::Error for DecodeError {}

/// Decodes the payload frame of one message. Events that cannot be used are left out and counted in `discards`.
pub fn decode_batch(payload: &[u8]) -> Result<Batch, DecodeError> {
    let mut reader = Reader::new(payload);
    let parts = read_parts(&mut reader).map_err(|broken| {
        let at = payload.len() - reader.rest.len();
        DecodeError::new("bad_msgpack", format!("{} (byte {at})", broken.text()))
    })?;
    parts.ok_or_else(|| DecodeError::new("bad_batch", "expected [ts, events, rank]"))?.into_batch()
}

/// A batch as it was sent.
struct Parts<'a> {
    ts: Value<'a>,
    /// None if it is no list.
    events: Option<Result<Events, TooMany>>,
    rank: Value<'a>,
}

struct Events {
    events: Vec<Event>,
    discards: Vec<(&'static str, u64)>,
}

struct TooMany(usize);

impl Parts<'_> {
    fn into_batch(self) -> Result<Batch, DecodeError> {
        let (Some(ts), Some(events)) = (seconds(self.ts), self.events) else {
            return Err(DecodeError::new("bad_batch", "expected a number and a list of events"));
        };
        let rank = match self.rank {
            Value::Nil => None,
            Value::Uint(rank) if rank <= u64::from(MAX_RANK) => u32::try_from(rank).ok(),
            _ => {
                return Err(DecodeError::new("bad_rank", format!("expected a rank from 0 to {MAX_RANK}")));
            }
        };
        let Events { events, discards } = events.map_err(|TooMany(count)| {
            DecodeError::new("too_many_events", format!("{count} events, at most {MAX_EVENTS} are read"))
        })?;
        Ok(Batch { ts, rank, events, discards })
    }
}

/// None if the payload is msgpack, but no batch.
fn read_parts<'a>(reader: &mut Reader<'a>) -> Result<Option<Parts<'a>>, Broken> {
    let value = reader.value()?;
    let parts = match value {
        Value::Array(len) if len >= 2 => {
            let ts = read_value(reader)?;
            let events = read_events(reader)?;
            let rank = if len > 2 { read_value(reader)? } else { Value::Nil };
            reader.skip_many(len.saturating_sub(3))?;
            Some(Parts { ts, events, rank })
        }
        Value::Map(len) => Some(read_map(len, reader)?),
        _ => {
            reader.skip_inside(value)?;
            None
        }
    };
    reader.finish()?;
    Ok(parts)
}

fn read_map<'a>(len: usize, reader: &mut Reader<'a>) -> Result<Parts<'a>, Broken> {
    let (mut ts, mut events, mut rank) = (Value::Nil, None, Value::Nil);
    for _ in 0..len {
        match reader.key()? {
            Some(b"ts") => ts = read_value(reader)?,
            Some(b"data_parallel_rank") => rank = read_value(reader)?,
            Some(b"events") => {
                // read below, when it is known that the key does not come again
                events = Some(*reader);
                reader.skip()?;
            }
            key => {
                reader::text(key.unwrap_or_default())?;
                reader.skip()?;
            }
        }
    }
    let events = match events {
        Some(mut events) => read_events(&mut events)?,
        None => None,
    };
    Ok(Parts { ts, events, rank })
}

/// Reads any value, of which the insides do not matter.
fn read_value<'a>(reader: &mut Reader<'a>) -> Result<Value<'a>, Broken> {
    let value = reader.value()?;
    reader.skip_inside(value)?;
    Ok(value)
}

fn read_events<'a>(reader: &mut Reader<'a>) -> Result<Option<Result<Events, TooMany>>, Broken> {
    let value = reader.value()?;
    let count = match value {
        Value::Array(count) if count <= MAX_EVENTS => count,
        Value::Array(count) => {
            return reader.skip_inside(value).map(|()| Some(Err(TooMany(count))));
        }
        _ => return reader.skip_inside(value).map(|()| None),
    };
    let mut read = Events { events: Vec::with_capacity(count.min(ROOM)), discards: Vec::new() };
    let mut draft = Draft::new();
    for _ in 0..count {
        draft.read(reader)?;
        match draft.finish() {
            Ok(event) => read.events.push(event),
            Err(reason) => match read.discards.iter_mut().find(|(known, _)| *known == reason) {
                Some((_, count)) => *count += 1,
                None => read.discards.push((reason, 1)),
            },
        }
    }
    Ok(Some(Ok(read)))
}

fn seconds(ts: Value) -> Option<f64> {
    match ts {
        Value::Uint(ts) if ts > MILLISECONDS => Some(thousandth(ts)),
        Value::Uint(ts) => Some(ts as f64),
        Value::Negative(ts) => Some(ts as f64),
        Value::Float(ts) if ts > MILLISECONDS as f64 => Some(ts / 1000.0),
        Value::Float(ts) => Some(ts),
        _ => None,
    }
}

/// Rounded once, as Python divides integers, also where the integer itself does not fit a float.
fn thousandth(value: u64) -> f64 {
    const SHIFT: u32 = 60;
    if value < 1 << f64::MANTISSA_DIGITS {
        return value as f64 / 1000.0;
    }
    let scaled = u128::from(value) << SHIFT;
    // far below the last digit of the result, a bit that stands for all that is cut off
    let quotient = (scaled / 1000) | u128::from(!scaled.is_multiple_of(1000));
    quotient as f64 / (1u64 << SHIFT) as f64
}
