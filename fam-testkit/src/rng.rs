//! The generator behind every case. Its output for a seed never changes: a printed seed replays its case in any later version.

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014) with integer-only sampling,
/// so that no libm and no platform enters a case.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of a seed.
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// An independent generator for a part of a case: what one part draws never moves another.
    pub fn of(seed: u64, part: &str) -> Self {
        let mut rng = Rng(seed ^ hash(part.bytes().map(u64::from)));
        Rng(rng.next())
    }

    /// 64 random bits.
    #[allow(clippy::should_implement_trait)] // Not an iterator: it never ends and is not adapted.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An integer in `0 .. n`; 0 for n = 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    /// An integer in `low ..= high`.
    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low + 1) as usize) as i64
    }

    /// True `of` times in `n`.
    pub fn chance(&mut self, of: usize, n: usize) -> bool {
        self.below(n) < of
    }

    /// One of `items`, which are not empty.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    /// `items` in random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// Uniform in [0, 1), in steps of 2⁻⁵³.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Mean 0, variance 1: the sum of eight 16-bit uniforms, which differs from a Gaussian only beyond four deviations.
    pub fn normal(&mut self) -> f64 {
        let (a, b) = (self.next(), self.next());
        let sum: u64 = (0..4).map(|i| ((a >> (16 * i)) & 0xffff) + ((b >> (16 * i)) & 0xffff)).sum();
        // Eight uniforms on 0 ..= 65535: mean 4·65535, variance 8·(65536² − 1)/12.
        (sum as f64 - 262_140.0) / 53_509.919_921_450_08
    }

    /// 1 or −1.
    pub fn sign(&mut self) -> f64 {
        if self.next() >> 63 == 0 { 1.0 } else { -1.0 }
    }
}

/// FNV-1a over words: what tells results apart, not a guard against anyone.
pub(crate) fn hash(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ word).wrapping_mul(0x100_0000_01b3))
}

/// The seed of case `index` of a suite.
pub fn case_seed(suite: u64, index: u64) -> u64 {
    Rng(suite.wrapping_add(index.wrapping_mul(0xd134_2543_de82_ef95))).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stable_forever() {
        let mut rng = Rng::new(0);
        assert_eq!(rng.next(), 0xe220_a839_7b1d_cdaf); // The published first output of SplitMix64 for seed 0.
        assert_eq!([(); 3].map(|()| rng.below(1000)), [431, 26, 970]);
        assert_eq!(case_seed(1, 2), case_seed(1, 2));
        assert_ne!(case_seed(1, 2), case_seed(2, 1));
    }

    #[test]
    fn moments() {
        let mut rng = Rng::new(7);
        let n = 200_000;
        let (mut sum, mut squares) = (0.0, 0.0);
        for _ in 0..n {
            let x = rng.normal();
            sum += x;
            squares += x * x;
        }
        assert!((sum / n as f64).abs() < 0.01 && (squares / n as f64 - 1.0).abs() < 0.02);
    }
}
