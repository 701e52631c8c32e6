//! From the bytes of one event to the event, or to the reason why it cannot be used.
//!
//! When several things are wrong, which of them is named depends on the order in which they are looked at here, and
//! `kvevents/wire.py` has the same order.

use std::mem;
use std::sync::Arc;

use super::extras::{self, Context, Extras};
use super::fields::{self, Field, Fields, List, Scalar};
use super::media;
use super::reader::{Broken, Reader, Value};
use crate::events::{EngineHash, Event, Lora, Removed, Stored};

pub const MAX_BLOCK_SIZE: u32 = 65_536;
pub const MAX_GROUP: u32 = 65_535;
pub const MAX_WINDOW: u32 = 1 << 31;
pub const MAX_LORA: u64 = 1 << 63;
/// In characters.
pub const MAX_TEXT: usize = 1_024;
/// Tagged arrays with more fields after the tag name images with their place: vLLM 0.20 added `group_idx`.
const BARE_FIELDS: usize = 8;

/// The parent of blocks that have one which the publisher does not name (LMCache sends it so, WIRE B1a).
const NOT_SAID: Scalar = Scalar::Uint(0);

/// A value, or the reason why the event cannot be used.
pub type Outcome<T> = Result<T, &'static str>;

#[derive(Clone, Copy)]
enum Kind {
    Stored,
    Removed,
    Cleared,
}

/// An event that was read, but not yet judged. One after the other can be read into the same place.
pub struct Draft<'a> {
    kind: Outcome<Kind>,
    fields: Fields<'a>,
    /// Images come with their place.
    pairs: bool,
}

impl<'a> Draft<'a> {
    pub const fn new() -> Self {
        Self { kind: Err("bad_event"), fields: Fields::new(), pairs: true }
    }

    /// Reads one event. `Broken` means that the batch is: bytes that hold a broken event cost that event alone.
    pub fn read(&mut self, reader: &mut Reader<'a>) -> Result<(), Broken> {
        match reader.value()? {
            Value::Bytes(packed) => {
                let mut packed = Reader::new(packed);
                let read = packed.value().and_then(|value| self.read_open(value, &mut packed));
                if read.and_then(|()| packed.finish()).is_err() {
                    self.kind = Err("bad_msgpack");
                }
                Ok(())
            }
            value => self.read_open(value, reader),
        }
    }

    fn read_open(&mut self, value: Value<'a>, reader: &mut Reader<'a>) -> Result<(), Broken> {
        self.fields.clear();
        self.kind = match value {
            Value::Array(len) => self.read_array(len, reader)?,
            Value::Map(len) => self.read_map(len, reader)?,
            _ => reader.skip_inside(value).map(|()| Err("bad_event"))?,
        };
        Ok(())
    }

    fn read_array(&mut self, len: usize, reader: &mut Reader<'a>) -> Result<Outcome<Kind>, Broken> {
        let Some(behind) = len.checked_sub(1) else {
            return Ok(Err("bad_event"));
        };
        let value = reader.value()?;
        let kind = match value {
            Value::Text(tag) => kind_of(tag),
            _ => reader.skip_inside(value).map(|()| Err("bad_event"))?,
        };
        let names: &[Field] = match kind {
            Ok(Kind::Stored) => &fields::STORED,
            Ok(Kind::Removed) => &fields::REMOVED,
            _ => &[],
        };
        for field in names.iter().take(behind) {
            self.fields.read(*field, reader)?;
        }
        reader.skip_many(behind.saturating_sub(names.len()))?;
        self.pairs = behind > BARE_FIELDS;
        Ok(kind)
    }

    fn read_map(&mut self, len: usize, reader: &mut Reader<'a>) -> Result<Outcome<Kind>, Broken> {
        self.fields.read_map(len, reader)?;
        self.pairs = true;
        Ok(match (self.fields.get(Field::Type), self.fields.get(Field::EventType)) {
            (Scalar::Text(tag), _) => kind_of(tag),
            (Scalar::Absent | Scalar::Nil, Scalar::Text("stored")) => Ok(Kind::Stored),
            (Scalar::Absent | Scalar::Nil, Scalar::Text("removed")) => Ok(Kind::Removed),
            (Scalar::Absent | Scalar::Nil, Scalar::Text("cleared")) => Ok(Kind::Cleared),
            (Scalar::Absent | Scalar::Nil, Scalar::Text(_)) => Err("unknown_event"),
            _ => Err("bad_event"),
        })
    }

    /// The event that was read last, which is used up.
    pub fn finish(&mut self) -> Outcome<Event> {
        match self.kind? {
            Kind::Stored => self.stored().map(Event::Stored),
            Kind::Removed => self.removed().map(Event::Removed),
            Kind::Cleared => Ok(Event::Cleared),
        }
    }

    fn removed(&mut self) -> Outcome<Removed> {
        let fields = &mut self.fields;
        Ok(Removed {
            block_hashes: hashes(fields)?,
            medium: media::read(text(fields.get(Field::Medium))?),
            group: number(fields.get(Field::GroupIdx), MAX_GROUP, "bad_group")?,
        })
    }

    fn stored(&mut self) -> Outcome<Stored> {
        let fields = &mut self.fields;
        let block_hashes = hashes(fields)?;
        let token_ids = match mem::take(&mut fields.token_ids) {
            List::Nil => Vec::new(),
            List::Bad(reason) => return Err(reason),
            List::Read(tokens) => tokens,
        };
        let block_size = number(fields.get(Field::BlockSize), MAX_BLOCK_SIZE, "bad_block_size")?.unwrap_or(0);
        enough_tokens(block_hashes.len(), token_ids.len(), block_size as usize)?;
        let parent = match fields.get(Field::ParentBlockHash) {
            Scalar::Absent | Scalar::Nil => fields.get(Field::ParentHash),
            parent => parent,
        };
        let parent = match (parent, fields.get(Field::BaseBlockIdx)) {
            (Scalar::Absent | Scalar::Nil, Scalar::Uint(1..)) => NOT_SAID,
            _ => parent,
        };
        let root = matches!(parent, Scalar::Absent | Scalar::Nil);
        let lora_name = text(fields.get(Field::LoraName))?;
        let salt = match text(fields.get(Field::CacheSalt))? {
            None => text(fields.get(Field::AdditionalSalt))?,
            salt => salt,
        };
        let extras = if token_ids.is_empty() {
            Extras::default()
        } else {
            let context = Context { blocks: block_hashes.len(), lora: lora_name, root, pairs: self.pairs };
            extras::read(fields.extra_keys, &context)?
        };
        let parent = if root { None } else { Some(fields::hash(parent).ok_or("bad_hash")?) };
        let medium = media::read(text(fields.get(Field::Medium))?);
        let group = number(fields.get(Field::GroupIdx), MAX_GROUP, "bad_group")?;
        let kind = text(fields.get(Field::Kind))?;
        let sliding_window = number(fields.get(Field::Window), MAX_WINDOW, "bad_window")?;
        let lora = match lora_name {
            Some(name) => Some(Lora::Name(Arc::from(name))),
            None => lora_number(fields.get(Field::LoraId))?,
        };
        let model = text(fields.get(Field::ModelName))?;
        Ok(Stored {
            block_hashes,
            parent,
            token_ids,
            block_size,
            medium,
            group,
            kind: kind.map(Box::from),
            sliding_window,
            lora,
            cache_salt: salt.or(extras.salt).filter(|_| root).map(Box::from),
            extras: extras.bytes,
            bare_images: extras.bare,
            model: model.map(Box::from),
        })
    }
}

fn kind_of(tag: &str) -> Outcome<Kind> {
    match tag {
        "BlockStored" => Ok(Kind::Stored),
        "BlockRemoved" => Ok(Kind::Removed),
        "AllBlocksCleared" => Ok(Kind::Cleared),
        _ => Err("unknown_event"),
    }
}

fn hashes(fields: &mut Fields) -> Outcome<Vec<EngineHash>> {
    let hashes = match mem::take(&mut fields.block_hashes) {
        List::Nil => mem::take(&mut fields.seq_hashes),
        hashes => hashes,
    };
    match hashes {
        List::Nil => Err("bad_hashes"),
        List::Bad(reason) => Err(reason),
        List::Read(hashes) => Ok(hashes),
    }
}

/// An event may have tokens for more blocks than it names, not for fewer; its last block may be a partial one.
fn enough_tokens(blocks: usize, tokens: usize, block_size: usize) -> Outcome<()> {
    if tokens == 0 {
        Ok(())
    } else if block_size == 0 {
        Err("bad_block_size")
    } else if blocks > tokens.div_ceil(block_size) {
        Err("too_few_tokens")
    } else {
        Ok(())
    }
}

fn number(value: Scalar, most: u32, reason: &'static str) -> Outcome<Option<u32>> {
    match value {
        Scalar::Absent | Scalar::Nil => Ok(None),
        Scalar::Uint(value) => u32::try_from(value).ok().filter(|value| *value <= most).map(Some).ok_or(reason),
        _ => Err(reason),
    }
}

fn lora_number(value: Scalar) -> Outcome<Option<Lora>> {
    match value {
        Scalar::Absent | Scalar::Nil => Ok(None),
        Scalar::Uint(value) if value <= MAX_LORA => Ok(Some(Lora::Number(value.into()))),
        _ => Err("bad_lora"),
    }
}

/// Empty text is none.
fn text<'a>(value: Scalar<'a>) -> Outcome<Option<&'a str>> {
    match value {
        Scalar::Absent | Scalar::Nil | Scalar::Text("") => Ok(None),
        Scalar::Text(text) if text.len() <= MAX_TEXT || text.chars().count() <= MAX_TEXT => Ok(Some(text)),
        _ => Err("bad_text"),
    }
}
