//! The checks and what they are made of, for callers that may block.

use super::*;
use crate::wait::block_on;

/// Functions that wait for those that are awaited.
macro_rules! blocking {
    ($($name:ident = $awaited:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {$(
        #[doc = concat!("Waits for [`", stringify!($awaited), "`].\n\n# Errors\nIts own.")]
        pub fn $name($($argument: $type),*) -> Result<$result> {
            block_on($awaited($($argument),*))
        }
    )*};
}

blocking! {
    check = check_async(gpu: &Gpu, plan: GemvPlan) -> ();
    check_gemm = check_gemm_async(gpu: &Gpu, layout: Layout, plan: GemmPlan) -> ();
    check_groups = check_groups_async(gpu: &Gpu, int8: bool) -> ();
    check_head = check_head_async(gpu: &Gpu, max_rows: usize) -> ();
    check_sample = check_sample_async(gpu: &Gpu, vocab_size: usize) -> ();
    check_attention = check_attention_async(gpu: &Gpu, layout: KvLayout) -> ();
    multiply = multiply_async(
        gpu: &Gpu, plans: SumPlans, packed: &Packed, codes: &[i8], n_tokens: usize
    ) -> Vec<i32>;
    multiply_many = multiply_many_async(
        gpu: &Gpu, packed: &Packed, codes: &[i8], call: impl FnOnce(Gemm) -> Call
    ) -> (&'static str, Vec<i32>);
    multiply_groups = multiply_groups_async(
        gpu: &Gpu, matrix: &TernaryMatrix, input: GroupInput<'_>, n_tokens: usize
    ) -> Vec<f32>;
    quantize = quantize_async(
        gpu: &Gpu, encoding: Encoding, x: &[f32], n_tokens: usize
    ) -> QuantizedWords;
    attend = attend_async(
        gpu: &Gpu, cache: &TestCache, how: Attend, query: &[f32], start: usize
    ) -> Vec<f32>;
    draw_tokens = draw_tokens_async(
        gpu: &Gpu, pipelines: &Pipelines, logits: &[f32], seen: &[u32], params: PassParams,
        uniforms: &[f32]
    ) -> Drawn;
}

impl Heads<'_> {
    /// Waits for [`Heads::find_exact_async`].
    ///
    /// # Errors
    /// Its own.
    pub fn find_exact(&self, hidden: &[f32]) -> Result<HeadFound> {
        block_on(self.find_exact_async(hidden))
    }

    /// Waits for [`Heads::find_exact_rows_async`].
    ///
    /// # Errors
    /// Its own.
    pub fn find_exact_rows(&self, hidden: &[f32]) -> Result<Vec<HeadFound>> {
        block_on(self.find_exact_rows_async(hidden))
    }

    /// Waits for [`Heads::find_int8_async`].
    ///
    /// # Errors
    /// Its own.
    pub fn find_int8(
        &self,
        hidden: &[f32],
        seen: &[u32],
        penalty: f32,
    ) -> Result<(HeadFound, usize)> {
        block_on(self.find_int8_async(hidden, seen, penalty))
    }

    /// Waits for [`Heads::find_int8_rows_async`].
    ///
    /// # Errors
    /// Its own.
    pub fn find_int8_rows(
        &self,
        hidden: &[f32],
        seen: &[u32],
        penalty: f32,
    ) -> Result<Vec<(HeadFound, usize)>> {
        block_on(self.find_int8_rows_async(hidden, seen, penalty))
    }
}
