//! Vectors of floats, so that attention is written once for all levels.
#![expect(unsafe_code, reason = "loads and stores by address, and calls into target features")]

use super::attention::widen_half;

/// Some floats side by side. Operations round each by itself, like those of `f32`.
///
/// Everything is inlined into the caller, which alone decides what the compiler may use.
///
/// # Safety
///
/// Whoever calls a function promises that this machine has the type's instructions, that the caller
/// is compiled for them, and that [`Lanes::N`] values lie at an address given, of any alignment.
pub(super) trait Lanes: Copy {
    /// How many.
    const N: usize;
    /// Vectors side by side that a tile of four queries has registers for.
    const WIDE: usize;
    /// The value in all lanes.
    unsafe fn splat(value: f32) -> Self;
    /// The values.
    unsafe fn load(at: *const f32) -> Self;
    /// Halves of which none is subnormal, as `cpu_ref::kv::f16_value` has them.
    unsafe fn load_halves(at: *const u16) -> Self;
    /// Integers.
    unsafe fn load_codes(at: *const i8) -> Self;
    /// To memory that may be written.
    unsafe fn store(self, at: *mut f32);
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// `self · other`.
    unsafe fn mul(self, other: Self) -> Self;
    /// Asks for the cache line of an address, valid or not.
    unsafe fn prefetch(at: *const u8);
}

/// Plain arrays, of which the compiler makes what its target has.
#[derive(Clone, Copy)]
pub(super) struct Plain([f32; 16]);

impl Lanes for Plain {
    const N: usize = 16;
    const WIDE: usize = 1;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 16])
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { at.cast::<[f32; 16]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_halves(at: *const u16) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { at.cast::<[u16; 16]>().read_unaligned() }.map(widen_half))
    }

    #[inline(always)]
    unsafe fn load_codes(at: *const i8) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { at.cast::<[i8; 16]>().read_unaligned() }.map(f32::from))
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: as the trait demands.
        unsafe { at.cast::<[f32; 16]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn add(mut self, other: Self) -> Self {
        for (a, b) in self.0.iter_mut().zip(other.0) {
            *a += b;
        }
        self
    }

    #[inline(always)]
    unsafe fn mul(mut self, other: Self) -> Self {
        for (a, b) in self.0.iter_mut().zip(other.0) {
            *a *= b;
        }
        self
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}
