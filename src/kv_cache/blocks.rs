//! Which blocks of the KV cache hold which sequence: tables of blocks with counted references, so that
//! sequences share what they have in common.
//!
//! Position *s* of a sequence is slot `s mod 64` of block `table[s / 64]`, the same in every layer. A
//! fork shares all blocks of its origin; whoever first writes into a shared block gets a copy of it.
//! This file does the arithmetic; the storage of a block is its backend's.

use cpu_ref::reduce::KEY_LANES;

use crate::error::{Error, Result};

/// Positions of a block: what attention takes at a time.
pub const BLOCK: usize = KEY_LANES;

/// A sequence of a backend's KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(u32);

/// What must be done before positions are written: see [`Blocks::prepare`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    /// A block whose contents must be copied, and where to.
    pub copy: Option<(u32, u32)>,
    /// Blocks for which there must be room: their ids are below this.
    pub blocks: usize,
}

/// The tables of all sequences, and the references to every block.
#[derive(Debug, Clone)]
pub struct Blocks {
    /// Positions that one sequence may have.
    capacity: usize,
    /// How many sequences have each block; 0: it is free.
    references: Vec<u32>,
    /// Free blocks, the one to be taken next last.
    free: Vec<u32>,
    sequences: Vec<Option<Vec<u32>>>,
}

impl Blocks {
    /// No sequences yet, of at most `capacity` positions each.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, references: Vec::new(), free: Vec::new(), sequences: Vec::new() }
    }

    /// Positions that one sequence may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// An empty sequence. Ids of closed ones are used again.
    pub fn open(&mut self) -> SequenceId {
        self.insert(Vec::new())
    }

    /// A sequence with the first `positions` of another, whose blocks it shares.
    ///
    /// # Errors
    /// [`Error::NoSequence`] if there is none, [`Error::ContextOverflow`] if it is shorter.
    pub fn fork(&mut self, of: SequenceId, positions: usize) -> Result<SequenceId> {
        let table = self.table(of)?;
        let blocks = positions.div_ceil(BLOCK);
        let shared = table
            .get(..blocks)
            .ok_or(Error::ContextOverflow { needed: positions, capacity: table.len() * BLOCK })?;
        let shared = shared.to_vec();
        for &block in &shared {
            self.references[block as usize] += 1;
        }
        Ok(self.insert(shared))
    }

    /// Forgets a sequence, and frees the blocks that no other has.
    ///
    /// # Errors
    /// [`Error::NoSequence`] if there is none.
    pub fn close(&mut self, sequence: SequenceId) -> Result<()> {
        self.truncate(sequence, 0)?;
        self.sequences[sequence.0 as usize] = None;
        Ok(())
    }

    /// Frees the blocks of a sequence that hold none of its first `positions`, as far as no other has
    /// them.
    ///
    /// # Errors
    /// [`Error::NoSequence`] if there is none.
    pub fn truncate(&mut self, sequence: SequenceId, positions: usize) -> Result<()> {
        self.table(sequence)?;
        let keep = positions.div_ceil(BLOCK);
        let table = self.sequences[sequence.0 as usize].as_mut().expect("looked up above");
        let dropped = table.split_off(keep.min(table.len()));
        for block in dropped.into_iter().rev() {
            self.release(block);
        }
        Ok(())
    }

    /// Gives a sequence blocks of its own for positions `start..end`, of which those before `start` are
    /// there. The caller makes room for [`Prepared::blocks`] and then does [`Prepared::copy`]
    /// before anything is written.
    ///
    /// # Errors
    /// [`Error::NoSequence`] if there is none, [`Error::ContextOverflow`] if the positions are past the
    /// capacity or leave a gap after those that there are.
    pub fn prepare(&mut self, sequence: SequenceId, start: usize, end: usize) -> Result<Prepared> {
        let len = self.table(sequence)?.len();
        if end > self.capacity {
            return Err(Error::ContextOverflow { needed: end, capacity: self.capacity });
        }
        if start > len * BLOCK {
            return Err(Error::ContextOverflow { needed: start, capacity: len * BLOCK });
        }
        // Blocks after the one of `start` hold nothing that is still wanted.
        self.truncate(sequence, start.next_multiple_of(BLOCK))?;
        let mut copy = None;
        let mut table = self.sequences[sequence.0 as usize].take().expect("looked up above");
        if !start.is_multiple_of(BLOCK) {
            let last = table.last_mut().expect("start is past the start of this block");
            if self.references[*last as usize] > 1 {
                let own = self.take();
                copy = Some((*last, own));
                self.release(*last);
                *last = own;
            }
        }
        while table.len() < end.div_ceil(BLOCK) {
            table.push(self.take());
        }
        self.sequences[sequence.0 as usize] = Some(table);
        Ok(Prepared { copy, blocks: self.references.len() })
    }

    /// The blocks of a sequence, in the order of its positions.
    ///
    /// # Errors
    /// [`Error::NoSequence`] if there is none.
    pub fn table(&self, sequence: SequenceId) -> Result<&[u32]> {
        let table = self.sequences.get(sequence.0 as usize).and_then(Option::as_ref);
        table.map(Vec::as_slice).ok_or(Error::NoSequence)
    }

    /// Blocks that some sequence has.
    pub fn in_use(&self) -> usize {
        self.references.len() - self.free.len()
    }

    /// Sequences that are open.
    pub fn sequences(&self) -> usize {
        self.sequences.iter().flatten().count()
    }

    fn insert(&mut self, table: Vec<u32>) -> SequenceId {
        let index = match self.sequences.iter().position(Option::is_none) {
            Some(index) => index,
            None => {
                self.sequences.push(None);
                self.sequences.len() - 1
            }
        };
        self.sequences[index] = Some(table);
        SequenceId(index as u32)
    }

    /// A free block, or a new one.
    fn take(&mut self) -> u32 {
        let block = self.free.pop().unwrap_or_else(|| {
            self.references.push(0);
            self.references.len() as u32 - 1
        });
        self.references[block as usize] = 1;
        block
    }

    fn release(&mut self, block: u32) {
        let references = &mut self.references[block as usize];
        *references -= 1;
        if *references == 0 {
            self.free.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_grows_by_blocks() {
        let mut blocks = Blocks::new(200);
        let sequence = blocks.open();
        assert_eq!(blocks.prepare(sequence, 0, 1).unwrap(), Prepared { copy: None, blocks: 1 });
        assert_eq!(blocks.prepare(sequence, 1, 64).unwrap(), Prepared { copy: None, blocks: 1 });
        assert_eq!(blocks.prepare(sequence, 64, 129).unwrap(), Prepared { copy: None, blocks: 3 });
        assert_eq!(blocks.table(sequence).unwrap(), [0, 1, 2]);
        let error = blocks.prepare(sequence, 129, 201).unwrap_err();
        assert!(matches!(error, Error::ContextOverflow { needed: 201, capacity: 200 }));
        assert!(blocks.prepare(sequence, 193, 194).is_err(), "a gap");
        // Writing at 10 makes the rest worthless.
        assert_eq!(blocks.prepare(sequence, 10, 11).unwrap(), Prepared { copy: None, blocks: 3 });
        assert_eq!((blocks.table(sequence).unwrap(), blocks.in_use()), (&[0][..], 1));
    }

    #[test]
    fn eight_forks_share_a_prefix() {
        let mut blocks = Blocks::new(4096);
        let first = blocks.open();
        blocks.prepare(first, 0, 1000).unwrap();
        assert_eq!(blocks.in_use(), 16);
        let forks: Vec<_> = (0..7).map(|_| blocks.fork(first, 1000).unwrap()).collect();
        assert_eq!((blocks.in_use(), blocks.sequences()), (16, 8));
        for (n, &fork) in forks.iter().enumerate() {
            let prepared = blocks.prepare(fork, 1000, 1001).unwrap();
            assert_eq!(prepared.copy, Some((15, 16 + n as u32)));
        }
        // All others have copies of the last block by now.
        assert_eq!(blocks.prepare(first, 1000, 1001).unwrap().copy, None);
        assert_eq!(blocks.in_use(), 23);
        for fork in forks {
            blocks.close(fork).unwrap();
            assert!(matches!(blocks.table(fork), Err(Error::NoSequence)));
        }
        assert_eq!((blocks.in_use(), blocks.sequences()), (16, 1));
        blocks.close(first).unwrap();
        assert_eq!((blocks.in_use(), blocks.sequences()), (0, 0));
        assert!(blocks.close(first).is_err());
    }

    #[test]
    fn a_fork_at_a_boundary_copies_nothing() {
        let mut blocks = Blocks::new(4096);
        let first = blocks.open();
        blocks.prepare(first, 0, 130).unwrap();
        let fork = blocks.fork(first, 128).unwrap();
        assert_eq!(blocks.prepare(fork, 128, 129).unwrap(), Prepared { copy: None, blocks: 4 });
        assert_eq!(blocks.table(fork).unwrap(), [0, 1, 3]);
        assert!(blocks.fork(first, 193).is_err());
    }
}
