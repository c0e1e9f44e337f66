//! Seeded pseudo-random vectors for self-tests, tests and benches: the same on every machine.

/// SplitMix64 (Steele, Lea & Flood 2014): for vectors, not for sampling text.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator whose numbers depend on the seed alone.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// 0 to `n − 1`; `n` is at least 1.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Uniform in −1..1, a multiple of 2⁻²³.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Uniform in −magnitude..magnitude.
    pub fn floats(&mut self, len: usize, magnitude: f32) -> Vec<f32> {
        (0..len).map(|_| self.unit() * magnitude).collect()
    }

    /// Ternary weights.
    pub fn trits(&mut self, len: usize) -> Vec<i8> {
        (0..len).map(|_| self.below(3) as i8 - 1).collect()
    }

    /// Activation codes, −128 to 127.
    pub fn codes(&mut self, len: usize) -> Vec<i8> {
        (0..len).map(|_| (self.below(256) as i32 - 128) as i8).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn published_vector() {
        // Java's SplittableRandom(1234567), the first three of its reference outputs.
        let mut random = Random::new(1_234_567);
        let found = [random.bits(), random.bits(), random.bits()];
        let expected =
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!(found, expected);
    }

    #[test]
    fn ranges() {
        let mut random = Random::new(1);
        assert!(random.floats(1000, 3.0).iter().all(|value| value.abs() <= 3.0));
        assert!(random.trits(1000).iter().all(|trit| (-1..=1).contains(trit)));
        let codes = random.codes(10_000);
        assert!(codes.contains(&-128) && codes.contains(&127));
    }
}
