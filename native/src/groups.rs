//! How an engine's own prefix look-up uses its cache groups: the twin of `indexer/groups.py`.

/// What a cache group needs to serve a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSpec {
    pub block_size: u32,
    /// How many blocks before the prefix's end must be there; None: all.
    pub tail: Option<u64>,
}

impl GroupSpec {
    /// Reads what an event says of its group. Kinds that are not known need all blocks, which never overstates.
    pub fn of(kind: Option<&str>, sliding_window: Option<u32>, block_size: u32) -> Self {
        if kind.is_some_and(|kind| kind.starts_with("mamba")) {
            return Self { block_size, tail: Some(1) }; // the last state stands for everything before it
        }
        match sliding_window {
            Some(window) if window > 0 && kind.is_none_or(|kind| kind.contains("sliding_window")) => {
                let tail = (u64::from(window) - 1).div_ceil(u64::from(block_size)).max(1);
                Self { block_size, tail: Some(tail) }
            }
            _ => Self { block_size, tail: None },
        }
    }
}

/// The blocks of a prompt that one group holds: spans of block numbers `start <= i < end`, apart and in order.
pub struct GroupBlocks {
    pub spec: GroupSpec,
    pub spans: Vec<(u64, u64)>,
}

impl GroupBlocks {
    /// The longest prefix up to `tokens` that the group can serve, in tokens.
    fn longest(&self, tokens: u64) -> u64 {
        let size = u64::from(self.spec.block_size);
        let limit = tokens / size;
        let Some(tail) = self.spec.tail else {
            return match self.spans.first() {
                Some((0, end)) => *end.min(&limit) * size,
                _ => 0,
            };
        };
        for (start, stop) in self.spans.iter().rev().filter(|(start, _)| *start < limit) {
            let end = *stop.min(&limit);
            if end - start >= tail.min(end) {
                return end * size;
            }
        }
        0
    }
}

/// The longest prefix up to `tokens`, in tokens, that all groups can serve.
pub fn longest_prefix(groups: &[GroupBlocks], tokens: u64) -> u64 {
    let step = groups.iter().fold(1, |step, group| lcm(step, u64::from(group.spec.block_size)));
    let mut length = tokens / step * step;
    while length > 0 {
        let served = groups.iter().map(|group| group.longest(length)).min().unwrap_or(0) / step * step;
        if served == length {
            return length;
        }
        length = served;
    }
    0
}

fn lcm(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    // sizes come from the wire: where no prefix can be a multiple of them all, none is served
    (a / x).saturating_mul(b)
}
