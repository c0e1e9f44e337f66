//! The elements of a large tensor: in memory, or where the file has them.

use std::marker::PhantomData;

use bytemuck::Pod;

use super::{Bytes, mapped};

/// Numbers `[len]`, read-only. Those that are mapped take memory only where they are read.
#[derive(Clone)]
pub struct Elements<T>(Store<T>);

#[derive(Clone)]
enum Store<T> {
    Owned(Vec<T>),
    /// Whole elements, aligned, in the byte order of this machine.
    Bytes(Bytes, PhantomData<T>),
}

impl<T: Pod> Elements<T> {
    /// Elements in this machine's byte order as they lie in a file; `None` if they cannot be read there,
    /// because they are not aligned.
    pub fn in_place(bytes: &Bytes) -> Option<Self> {
        bytemuck::try_cast_slice::<u8, T>(bytes)
            .is_ok()
            .then(|| Self(Store::Bytes(bytes.clone(), PhantomData)))
    }

    /// Copies them out of a mapped file.
    pub fn take_into_memory(&mut self) {
        if let Store::Bytes(Bytes::Mapped(_), _) = self.0 {
            self.0 = Store::Owned(self.to_vec());
        }
    }

    /// Gives memory back that mapped elements take because they were read; they can be read again.
    pub fn release(&self) {
        if let Store::Bytes(Bytes::Mapped(map), _) = &self.0 {
            mapped::release(map);
        }
    }
}

impl<T> From<Vec<T>> for Elements<T> {
    fn from(elements: Vec<T>) -> Self {
        Self(Store::Owned(elements))
    }
}

impl<T: Pod + PartialEq> PartialEq for Elements<T> {
    fn eq(&self, other: &Self) -> bool {
        self[..] == other[..]
    }
}

impl<T: Pod + Eq> Eq for Elements<T> {}

impl<T: Pod> std::fmt::Debug for Elements<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} elements", self.len())
    }
}

impl<T: Pod> std::ops::Deref for Elements<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Store::Owned(elements) => elements,
            Store::Bytes(bytes, _) => bytemuck::cast_slice(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_aligned_whole_elements_stay_in_place() {
        #[repr(align(8))]
        struct Aligned([u8; 9]);
        static BYTES: Aligned = Aligned([1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let of = |range: std::ops::Range<usize>| {
            Elements::<u16>::in_place(&Bytes::Static(&BYTES.0[range]))
        };
        let expected = [u16::from_ne_bytes([3, 4]), u16::from_ne_bytes([5, 6])];
        assert_eq!(of(2..6).unwrap()[..], expected);
        assert!(of(1..5).is_none());
        assert!(of(0..9).is_none());
        let mut owned = Elements::from(vec![1.0f32, 2.0]);
        owned.release();
        owned.take_into_memory();
        assert_eq!(owned[..], [1.0, 2.0]);
    }
}
