//! Block keys: the twin of `indexer/keys.py`.

use std::ops::Range;
use std::slice::{self, ChunksExact};

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::events::Lora;
use crate::msgpack;

/// An image or other multimodal item of a prompt: identifier, first token, number of tokens.
#[derive(Clone, Debug)]
pub struct ImageItem {
    pub name: String,
    pub first: u64,
    pub length: u64,
}

/// The key that stands before the first block of a chain.
pub fn root_key(model: &str, block_size: u32, lora: Option<&Lora>, salt: Option<&str>) -> u64 {
    let mut text = Vec::with_capacity(64 + model.len());
    msgpack::write_array_len(&mut text, 4);
    msgpack::write_str(&mut text, model);
    msgpack::write_int(&mut text, i128::from(block_size));
    match lora {
        None => msgpack::write_nil(&mut text),
        Some(Lora::Name(name)) => msgpack::write_str(&mut text, name),
        Some(Lora::Number(number)) => msgpack::write_int(&mut text, *number),
    }
    match salt {
        None => msgpack::write_nil(&mut text),
        Some(salt) => msgpack::write_str(&mut text, salt),
    }
    xxh3_64(&text)
}

/// The keys of the whole blocks in `tokens`, the first following `parent`. With extras it stops where they end.
pub fn chain<'a>(parent: u64, tokens: &'a [u32], block_size: usize, extras: Option<&'a [Vec<u8>]>) -> Chain<'a> {
    Chain { key: parent, blocks: tokens.chunks_exact(block_size), extras: extras.map(<[_]>::iter), row: Vec::new() }
}

/// See `chain`. Who does something with each key before he asks for the next does it while that is being computed: each
/// depends on the one before, so the processor has time.
pub struct Chain<'a> {
    key: u64,
    blocks: ChunksExact<'a, u32>,
    extras: Option<slice::Iter<'a, Vec<u8>>>,
    row: Vec<u8>,
}

impl Iterator for Chain<'_> {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        let block = self.blocks.next()?;
        self.key = match &mut self.extras {
            None => with_bytes(block, |bytes| xxh3_64_with_seed(bytes, self.key)),
            Some(extras) => {
                self.row.clear();
                with_bytes(block, |bytes| self.row.extend_from_slice(bytes));
                self.row.extend_from_slice(extras.next()?);
                xxh3_64_with_seed(&self.row, self.key)
            }
        };
        Some(self.key)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let blocks = self.blocks.len();
        let keys = self.extras.as_ref().map_or(blocks, |extras| extras.len().min(blocks));
        (keys, Some(keys))
    }
}

/// Hands over tokens as little-endian bytes.
#[inline]
fn with_bytes<T>(tokens: &[u32], work: impl FnOnce(&[u8]) -> T) -> T {
    if cfg!(target_endian = "little") {
        // SAFETY: any u32 is four valid bytes, alignment of u8 is 1, and the length is that of the slice.
        work(unsafe { std::slice::from_raw_parts(tokens.as_ptr().cast::<u8>(), std::mem::size_of_val(tokens)) })
    } else {
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        work(&bytes)
    }
}

/// The extra bytes of some consecutive blocks of a prompt with these images, none for a block without; `bare` leaves
/// places out.
pub fn image_extras(images: &[ImageItem], block_size: u64, blocks: Range<u64>, bare: bool) -> Vec<Vec<u8>> {
    let mut inside: Vec<(u64, u64, &str)> = images
        .iter()
        .flat_map(|image| {
            let end = image.first.saturating_add(image.length).div_ceil(block_size).min(blocks.end);
            let start = (image.first / block_size).max(blocks.start);
            (start..end).map(|block| (block, image.first, image.name.as_str()))
        })
        .collect();
    inside.sort_unstable();
    let mut extras = vec![Vec::new(); blocks.clone().count()];
    for found in inside.chunk_by(|one, next| one.0 == next.0) {
        let block = found[0].0;
        let out = &mut extras[(block - blocks.start) as usize];
        msgpack::write_array_len(out, found.len());
        for &(_, first, name) in found {
            if bare {
                msgpack::write_str(out, name);
            } else {
                msgpack::write_array_len(out, 2);
                msgpack::write_str(out, name);
                msgpack::write_int(out, i128::from(first) - i128::from(block * block_size));
            }
        }
    }
    extras
}
