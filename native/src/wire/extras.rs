//! Extra keys of vLLM: `[lora name, [image, offset]..., salt, prompt-embedding digest]` for each block, those that apply.

use super::fields::ExtraKeys;
use super::reader::{Broken, Reader, Value};
use crate::msgpack;

/// What else is known of the event.
pub struct Context<'a> {
    pub blocks: usize,
    pub lora: Option<&'a str>,
    /// The first block is the first of its prompt.
    pub root: bool,
    /// Images come with their place.
    pub pairs: bool,
}

#[derive(Default)]
pub struct Extras<'a> {
    pub salt: Option<&'a str>,
    /// The extra bytes of each block, None where no block has any.
    pub bytes: Option<Vec<Vec<u8>>>,
    /// Images came without their place.
    pub bare: bool,
}

pub fn read<'a>(extra_keys: ExtraKeys<'a>, context: &Context) -> Result<Extras<'a>, &'static str> {
    match extra_keys {
        ExtraKeys::Nil | ExtraKeys::Blank => Ok(Extras::default()),
        ExtraKeys::Items { count, items } if count == context.blocks => {
            read_blocks(items, context).ok().flatten().ok_or("bad_extra_keys")
        }
        ExtraKeys::Items { .. } | ExtraKeys::NotAList => Err("bad_extra_keys"),
    }
}

fn read_blocks<'a>(mut items: Reader<'a>, context: &Context) -> Result<Option<Extras<'a>>, Broken> {
    let mut extras = Extras::default();
    let mut bytes = Vec::with_capacity(context.blocks);
    for number in 0..context.blocks {
        match items.value()? {
            Value::Nil => bytes.push(Vec::new()),
            Value::Array(len) => {
                let Some(kept) = read_block(&mut items, len, number == 0, context, &mut extras)? else {
                    return Ok(None);
                };
                bytes.push(kept);
            }
            _ => return Ok(None),
        }
    }
    if bytes.iter().any(|kept| !kept.is_empty()) {
        extras.bytes = Some(bytes);
    }
    // an empty salt is none
    extras.salt = extras.salt.filter(|salt| !salt.is_empty());
    Ok(Some(extras))
}

/// What tells one block apart, written as msgpack; empty if there is nothing. None if a key is of no known kind.
fn read_block<'a>(
    items: &mut Reader<'a>,
    len: usize,
    first: bool,
    context: &Context,
    extras: &mut Extras<'a>,
) -> Result<Option<Vec<u8>>, Broken> {
    let mut kept = 0;
    let mut body = Vec::new();
    for number in 0..len {
        match items.value()? {
            Value::Text(text) if number == 0 && context.lora == Some(text) => continue,
            Value::Text(text) if first && context.root && (context.pairs || !is_digest(text)) => {
                extras.salt = Some(text);
                continue;
            }
            Value::Text(text) => {
                extras.bare |= !context.pairs;
                msgpack::write_str(&mut body, text);
            }
            Value::Bytes(bytes) => msgpack::write_bin(&mut body, bytes),
            Value::Array(2) => {
                let (Value::Text(image), place) = (items.value()?, items.value()?) else {
                    return Ok(None);
                };
                let place = match place {
                    Value::Uint(place) => i128::from(place),
                    Value::Negative(place) => i128::from(place),
                    _ => return Ok(None),
                };
                msgpack::write_array_len(&mut body, 2);
                msgpack::write_str(&mut body, image);
                msgpack::write_int(&mut body, place);
            }
            _ => return Ok(None),
        }
        kept += 1;
    }
    if kept == 0 {
        return Ok(Some(body));
    }
    let mut bytes = Vec::with_capacity(body.len() + 5);
    msgpack::write_array_len(&mut bytes, kept);
    bytes.append(&mut body);
    Ok(Some(bytes))
}

/// The identifier of an image of vLLM up to 0.18, which cannot be told from a salt otherwise.
fn is_digest(text: &str) -> bool {
    text.len() >= 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}
