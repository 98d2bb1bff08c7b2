//! A moment of every target with every test run: each sound input, each of its beginnings, and some thousand damaged ones.

use millrace_engine::disk::sim::SimRng;
use millrace_fuzz::TARGETS;

/// Damaged inputs of a target.
const ROUNDS: u64 = 2_000;

/// What breaks decoders: ends, signs, lengths.
const WORDS: [u32; 6] = [0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX, 0xffff];

fn damage(input: &mut Vec<u8>, rng: &mut SimRng) {
    for _ in 0..=rng.below(4) {
        if input.is_empty() {
            input.push(rng.next_u64() as u8);
        }
        let at = rng.below(input.len() as u64) as usize;
        match rng.below(6) {
            0 => input[at] ^= 1 << rng.below(8),
            1 => input[at] = rng.next_u64() as u8,
            2 => {
                let word = WORDS[rng.below(WORDS.len() as u64) as usize].to_be_bytes();
                let end = (at + 4).min(input.len());
                input[at..end].copy_from_slice(&word[..end - at]);
            }
            3 => input.truncate(at),
            4 => {
                let end = at + rng.below((input.len() - at) as u64 + 1).min(64) as usize;
                let piece = input[at..end].to_vec();
                input.splice(at..at, piece);
            }
            _ => {
                input.remove(at);
            }
        }
    }
}

#[test]
fn decoders_withstand_damaged_input() {
    let seed = std::env::var("MILLRACE_SEED").map_or(1, |s| s.parse().expect("MILLRACE_SEED is a number"));
    println!("MILLRACE_SEED={seed}");
    for target in TARGETS {
        let mut rng = SimRng::new(seed);
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{}: nothing to begin with", target.name);
        for sound in &seeds {
            (target.run)(sound);
            let step = (sound.len() / 200).max(1);
            for end in (0..sound.len()).step_by(step) {
                (target.run)(&sound[..end]);
            }
        }
        for round in 0..ROUNDS {
            let mut input = seeds[rng.below(seeds.len() as u64) as usize].clone();
            damage(&mut input, &mut rng);
            let ended = std::panic::catch_unwind(|| (target.run)(&input));
            assert!(
                ended.is_ok(),
                "{} round {round} of seed {seed}: {input:02x?}",
                target.name
            );
        }
    }
}
