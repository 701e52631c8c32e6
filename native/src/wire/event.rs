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

type Outcome<T> = Result<T, &'static str>;

/// Reads one event. `Broken` means that the batch is: bytes that hold a broken event cost that event alone.
pub fn read(reader: &mut Reader) -> Result<Outcome<Event>, Broken> {
    match reader.value()? {
        Value::Bytes(packed) => {
            let mut inner = Reader::new(packed);
            let outcome = inner.value().and_then(|value| read_open(value, &mut inner));
            let outcome = outcome.and_then(|outcome| inner.finish().map(|()| outcome));
            Ok(outcome.unwrap_or(Err("bad_msgpack")))
        }
        value => read_open(value, reader),
    }
}

fn read_open<'a>(value: Value, reader: &mut Reader<'a>) -> Result<Outcome<Event>, Broken> {
    match value {
        Value::Array(len) => read_array(len, reader),
        Value::Map(len) => {
            let mut fields = Fields::new();
            fields.read_map(len, reader)?;
            let tag = tag_of(&fields);
            Ok(finish(tag, fields, true))
        }
        _ => reader.skip_inside(value).map(|()| Err("bad_event")),
    }
}

fn read_array(len: usize, reader: &mut Reader) -> Result<Outcome<Event>, Broken> {
    let Some(behind) = len.checked_sub(1) else {
        return Ok(Err("bad_event"));
    };
    let value = reader.value()?;
    let tag = match value {
        Value::Text(text) => Scalar::Text(text),
        _ => Scalar::Other,
    };
    reader.skip_inside(value)?;
    let names: &[Field] = match tag {
        Scalar::Text("BlockStored") => &fields::STORED,
        Scalar::Text("BlockRemoved") => &fields::REMOVED,
        _ => &[],
    };
    let mut fields = Fields::new();
    for field in names.iter().take(behind) {
        fields.read(*field, reader)?;
    }
    reader.skip_many(behind.saturating_sub(names.len()))?;
    Ok(finish(tag, fields, behind > BARE_FIELDS))
}

/// Mooncake's own word for the kind of an event counts where it does not say the usual one.
fn tag_of<'a>(fields: &Fields<'a>) -> Scalar<'a> {
    match (fields.get(Field::Type), fields.get(Field::EventType)) {
        (Scalar::Absent | Scalar::Nil, Scalar::Text(kind)) => Scalar::Text(match kind {
            "stored" => "BlockStored",
            "removed" => "BlockRemoved",
            "cleared" => "AllBlocksCleared",
            _ => "unknown",
        }),
        (tag, _) => tag,
    }
}

fn finish(tag: Scalar, fields: Fields, pairs: bool) -> Outcome<Event> {
    match tag {
        Scalar::Text("BlockStored") => stored(fields, pairs).map(Event::Stored),
        Scalar::Text("BlockRemoved") => removed(fields).map(Event::Removed),
        Scalar::Text("AllBlocksCleared") => Ok(Event::Cleared),
        Scalar::Text(_) => Err("unknown_event"),
        _ => Err("bad_event"),
    }
}

fn removed(fields: Fields) -> Outcome<Removed> {
    let (medium, group) = (fields.get(Field::Medium), fields.get(Field::GroupIdx));
    Ok(Removed {
        block_hashes: hashes(fields.block_hashes, fields.seq_hashes)?,
        medium: media::read(text(medium)?),
        group: number(group, MAX_GROUP, "bad_group")?,
    })
}

fn stored(mut fields: Fields, pairs: bool) -> Outcome<Stored> {
    let block_hashes = hashes(mem::take(&mut fields.block_hashes), mem::take(&mut fields.seq_hashes))?;
    let token_ids = match mem::take(&mut fields.token_ids) {
        List::Nil => Vec::new(),
        List::Bad(reason) => return Err(reason),
        List::Read(tokens) => tokens,
    };
    let block_size = number(fields.get(Field::BlockSize), MAX_BLOCK_SIZE, "bad_block_size")?.unwrap_or(0);
    enough_tokens(block_hashes.len(), token_ids.len(), block_size as usize)?;
    let parent = match fields.get(Field::ParentBlockHash) {
        Scalar::Absent => fields.get(Field::ParentHash),
        parent => parent,
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
        let context = Context { blocks: block_hashes.len(), lora: lora_name, root, pairs };
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

fn hashes(block_hashes: List<EngineHash>, seq_hashes: List<EngineHash>) -> Outcome<Vec<EngineHash>> {
    let hashes = match block_hashes {
        List::Nil => seq_hashes,
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
