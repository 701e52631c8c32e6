//! The block keys of a prompt, computed once and only as far as somebody asks: the twin of `indexer/prompt.py`.

use crate::events::Lora;
use crate::keys::{ImageItem, chain, image_extras, root_key};

/// What decides, besides its tokens, which cached blocks fit a prompt; and the keys computed so far.
pub struct PromptKeys {
    pub model: Box<str>,
    pub lora: Option<Lora>,
    pub cache_salt: Option<Box<str>>,
    pub images: Vec<ImageItem>,
    chains: Vec<Chain>,
}

struct Chain {
    block_size: u32,
    bare: bool,
    keys: Vec<u64>,
}

impl PromptKeys {
    pub fn new(model: Box<str>, lora: Option<Lora>, cache_salt: Option<Box<str>>, images: Vec<ImageItem>) -> Self {
        Self { model, lora, cache_salt, images, chains: Vec::new() }
    }

    /// At least the first `upto` keys for blocks of `block_size` tokens, fewer where the prompt ends before. `tokens`
    /// are the prompt's, those it had at earlier calls unchanged.
    pub fn keys(&mut self, tokens: &[u32], block_size: u32, upto: usize, bare: bool) -> &[u64] {
        let bare = bare && !self.images.is_empty();
        let width = block_size as usize;
        let known = self.chains.iter().position(|chain| chain.block_size == block_size && chain.bare == bare);
        let place = known.unwrap_or_else(|| {
            self.chains.push(Chain { block_size, bare, keys: Vec::new() });
            self.chains.len() - 1
        });
        let keys = &mut self.chains[place].keys;
        let done = keys.len();
        let upto = upto.min(tokens.len() / width);
        if upto > done {
            let root = || root_key(&self.model, block_size, self.lora.as_ref(), self.cache_salt.as_deref());
            let parent = keys.last().copied().unwrap_or_else(root);
            let extras = (!self.images.is_empty())
                .then(|| image_extras(&self.images, u64::from(block_size), done as u64..upto as u64, bare));
            keys.extend(chain(parent, &tokens[done * width..upto * width], width, extras.as_deref()));
        }
        keys
    }
}

/// The tokens of a prompt, and its keys.
pub struct Asked<'a> {
    pub tokens: &'a [u32],
    pub keys: &'a mut PromptKeys,
}
