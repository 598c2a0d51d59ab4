//! The element-wise operations of a decoder block against f64, at every level.

mod every_kernels;

use every_kernels::every_kernels;
use kintsugi_kernels::{Activation, Kernels, RotaryTable, self_check};
use kintsugi_runtime::{CpuLevel, ErrorCode, ThreadPool};
use kintsugi_testkit::{Random, matrices};

const WIDTHS: [usize; 9] = [1, 2, 7, 31, 32, 33, 100, 257, 4096];

fn every_level(mut check: impl FnMut(&Kernels, &ThreadPool)) {
    for kernels in every_kernels() {
        for threads in [1, 3] {
            check(&kernels, &ThreadPool::with_threads(threads));
        }
    }
}

fn close(value: f32, expected: f64, relative: f64, absolute: f64) -> bool {
    (f64::from(value) - expected).abs() <= relative * expected.abs() + absolute
}

#[test]
fn rms_norm_is_that_of_f64() {
    every_level(|kernels, pool| {
        for width in WIDTHS {
            let rows = 9;
            let x = matrices::activations(width as u64, rows, width);
            let weight = matrices::activations(1, 1, width);
            let mut out = vec![f32::NAN; rows * width];
            kernels.rms_norm(&x, &weight, 1e-5, &mut out, pool);
            for (x, out) in x.chunks(width).zip(out.chunks(width)) {
                let square = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
                for ((&x, &out), &weight) in x.iter().zip(out).zip(&weight) {
                    let expected = f64::from(x) / (square + f64::from(1e-5_f32)).sqrt() * f64::from(weight);
                    assert!(close(out, expected, 1e-6, 1e-45), "{} {width}: {out} {expected}", kernels.level().name());
                }
            }
        }
    });
}

#[test]
fn rms_norm_of_a_row_does_not_depend_on_other_rows_and_keeps_nan_in_it() {
    every_level(|kernels, pool| {
        let width = 100;
        let x = matrices::activations(3, 700, width);
        let weight = vec![1.0; width];
        let mut all = vec![0.0; x.len()];
        kernels.rms_norm(&x, &weight, 1e-6, &mut all, pool);
        let mut one = vec![0.0; width];
        kernels.rms_norm(&x[600 * width..601 * width], &weight, 1e-6, &mut one, pool);
        assert_eq!(one, all[600 * width..601 * width]);

        let mut broken = x;
        broken[5 * width + 99] = f32::NAN;
        let mut out = vec![0.0; broken.len()];
        kernels.rms_norm(&broken, &weight, 1e-6, &mut out, pool);
        assert!(out[5 * width..6 * width].iter().all(|value| value.is_nan()));
        assert_eq!(out[6 * width..], all[6 * width..]);
        assert_eq!(out[..5 * width], all[..5 * width]);
    });
}

#[test]
fn silu_is_within_a_few_roundings_everywhere() {
    let mut random = Random::new(1);
    let mut gate: Vec<f32> = (0..40_000).map(|_| (random.normal() * 20.0) as f32).collect();
    gate.extend((-1100..1100).map(|i| i as f32 * 0.1));
    gate.extend([0.0, -0.0, 1e-40, -1e-40, 88.72, -88.72, -103.9, -104.1, 1e30, -1e30, 6e4, -6e4, 0.346_6, -0.346_5]);
    let up: Vec<f32> = gate.iter().map(|_| random.normal() as f32).collect();
    every_level(|kernels, pool| {
        let mut out = vec![f32::NAN; gate.len()];
        kernels.activate_multiply(Activation::Silu, &gate, &up, &mut out, pool);
        for ((&gate, &up), &out) in gate.iter().zip(&up).zip(&out) {
            let expected = f64::from(gate) / (1.0 + (-f64::from(gate)).exp()) * f64::from(up);
            // Below −88.7 e^−x is infinite, and the result zero.
            let vanished = 3e-37 * f64::from(up.abs()) + 1e-45;
            assert!(
                close(out, expected, 4e-7, vanished),
                "{} silu({gate}) · {up} = {out}, not {expected}",
                kernels.level().name()
            );
        }
    });
}

#[test]
fn silu_at_the_ends_of_the_numbers() {
    let gate = [f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, f32::NAN, 1.0];
    let up = [1.0, 1.0, 1.0, 1.0, 1.0, f32::NAN];
    every_level(|kernels, pool| {
        let mut out = [9.0; 6];
        kernels.activate_multiply(Activation::Silu, &gate, &up, &mut out, pool);
        assert_eq!(out[..4], [f32::INFINITY, 0.0, f32::MAX, 0.0], "{}", kernels.level().name());
        assert!(out[4].is_nan() && out[5].is_nan());
    });
}

#[test]
fn silu_of_an_element_does_not_depend_on_its_place() {
    every_level(|kernels, pool| {
        let gate = matrices::activations(1, 1, 50_001);
        let up = matrices::activations(2, 1, 50_001);
        let mut all = vec![0.0; gate.len()];
        kernels.activate_multiply(Activation::Silu, &gate, &up, &mut all, pool);
        for start in [1, 31, 49_990] {
            let mut part = vec![0.0; 11];
            kernels.activate_multiply(
                Activation::Silu,
                &gate[start..start + 11],
                &up[start..start + 11],
                &mut part,
                pool,
            );
            assert_eq!(part, all[start..start + 11]);
        }
    });
}

#[test]
fn add_assign_adds() {
    every_level(|kernels, pool| {
        for width in WIDTHS.into_iter().chain([50_000]) {
            let (x, y) = (matrices::activations(1, 1, width), matrices::activations(2, 1, width));
            let mut sum = x.clone();
            kernels.add_assign(&mut sum, &y, pool);
            assert!(sum.iter().zip(x.iter().zip(&y)).all(|(sum, (x, y))| *sum == x + y));
        }
    });
}

#[test]
fn heads_turn_by_the_angle_of_their_position() {
    let (heads, theta, scale) = (3, 10_000.0, 1.25);
    every_level(|kernels, pool| {
        for (head_dim, rotary_dim) in [(2, 2), (6, 6), (16, 4), (32, 32), (64, 64), (80, 32), (128, 128), (8, 0)] {
            let half = rotary_dim / 2;
            let frequencies: Vec<f64> =
                (0..half).map(|i| f64::powf(theta, -2.0 * i as f64 / f64::from(rotary_dim))).collect();
            let positions = [0, 1, 2, 17, 299, 5];
            let mut table = RotaryTable::new(half as usize);
            for position in positions {
                table.push(position, &frequencies, scale);
            }
            let head_dim = head_dim as usize;
            let x = matrices::activations(4, positions.len(), heads * head_dim);
            let mut turned = x.clone();
            kernels.rotate(&table, head_dim, &mut turned, pool);
            for (row, position) in positions.iter().enumerate() {
                for head in 0..heads {
                    let start = (row * heads + head) * head_dim;
                    let (x, turned) = (&x[start..start + head_dim], &turned[start..start + head_dim]);
                    for (i, frequency) in frequencies.iter().enumerate() {
                        let (a, b) = (f64::from(x[i]), f64::from(x[i + half as usize]));
                        let angle = f64::from(*position) * frequency;
                        let budget = 4e-7 * (a.abs() + b.abs());
                        let first = (a * angle.cos() - b * angle.sin()) * scale;
                        let second = (b * angle.cos() + a * angle.sin()) * scale;
                        assert!((f64::from(turned[i]) - first).abs() <= budget, "{} {first}", turned[i]);
                        assert!((f64::from(turned[i + half as usize]) - second).abs() <= budget);
                    }
                    assert_eq!(x[rotary_dim as usize..], turned[rotary_dim as usize..]);
                }
            }
        }
    });
}

#[test]
#[should_panic(expected = "whole heads in every row")]
fn a_rotary_table_for_other_rows_is_a_defect_of_the_caller() {
    let mut table = RotaryTable::new(1);
    table.push(0, &[1.0], 1.0);
    table.push(1, &[1.0], 1.0);
    Kernels::selected().unwrap().rotate(&table, 2, &mut [0.0; 6], &ThreadPool::with_threads(1));
}

#[test]
fn rms_norm_in_place_is_rms_norm() {
    every_level(|kernels, pool| {
        for width in WIDTHS {
            let mut x = matrices::activations(width as u64, 40, width);
            let weight = matrices::activations(1, 1, width);
            let mut out = vec![f32::NAN; x.len()];
            kernels.rms_norm(&x, &weight, 1e-5, &mut out, pool);
            kernels.rms_norm_assign(&mut x, &weight, 1e-5, pool);
            assert_eq!(x, out, "{} {width}", kernels.level().name());
        }
    });
}

#[test]
fn layer_norm_is_that_of_f64() {
    every_level(|kernels, pool| {
        for width in WIDTHS {
            // Rows whose mean is far from zero cancel.
            let x: Vec<f32> = matrices::activations(width as u64, 9, width).iter().map(|x| x + 3.0).collect();
            let (weight, bias) = (matrices::activations(1, 1, width), matrices::activations(2, 1, width));
            let mut out = vec![f32::NAN; x.len()];
            kernels.layer_norm(&x, &weight, &bias, 1e-5, &mut out, pool);
            for (x, out) in x.chunks(width).zip(out.chunks(width)) {
                let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
                let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
                let deviation = (variance + f64::from(1e-5_f32)).sqrt();
                let largest = x.iter().fold(0.0, |largest: f64, &x| largest.max(f64::from(x).abs()));
                for i in 0..width {
                    let weight = f64::from(weight[i]);
                    let expected = (f64::from(x[i]) - mean) / deviation * weight + f64::from(bias[i]);
                    // The mean carries the rounding of the largest value.
                    let budget =
                        4e-7 * (largest / deviation * weight.abs() + expected.abs() + f64::from(bias[i]).abs());
                    let error = (f64::from(out[i]) - expected).abs();
                    assert!(error <= budget, "{} {width}: {} {expected}", kernels.level().name(), out[i]);
                }
            }
        }
        let mut out = [9.0; 6];
        let x = [1.0, 2.0, f32::NAN, 4.0, 4.0, 4.0];
        kernels.layer_norm(&x, &[1.0; 3], &[0.5; 3], 1e-5, &mut out, pool);
        assert!(out[..3].iter().all(|value| value.is_nan()));
        assert_eq!(out[3..], [0.5; 3], "a constant row has no deviation");
    });
}

/// The activations in f64; erfc as an integral would be slow, so by its continued fraction and series.
fn gelu(x: f64) -> f64 {
    let z = x.abs() / std::f64::consts::SQRT_2;
    let erfc = if z < 2.5 {
        let (mut term, mut sum) = (z, z);
        for n in 1..200 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        1.0 - sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let fraction = (1..60).rev().fold(z, |fraction, n| z + f64::from(n) / 2.0 / fraction);
        (-z * z).exp() / fraction * 0.5 * std::f64::consts::FRAC_2_SQRT_PI
    };
    x.max(0.0) - x.abs() * erfc / 2.0
}

fn gelu_tanh(x: f64) -> f64 {
    let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    x / (1.0 + (-2.0 * u).exp())
}

#[test]
fn gelu_and_its_approximation_are_those_of_f64() {
    let mut random = Random::new(2);
    let mut x: Vec<f32> = (0..20_000).map(|_| (random.normal() * 4.0) as f32).collect();
    x.extend((-200..200).map(|i| i as f32 * 0.05));
    x.extend([0.0, -0.0, 1e-40, -1e-40, 1e-8, -1e-8, 14.0, -14.0, 1e4, -1e4, 1e30, -1e30]);
    let up: Vec<f32> = x.iter().map(|_| random.normal() as f32).collect();
    for (activation, exact) in [(Activation::Gelu, gelu as fn(f64) -> f64), (Activation::GeluTanh, gelu_tanh)] {
        every_level(|kernels, pool| {
            let (mut out, mut product) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
            kernels.activate(activation, &x, &mut out, pool);
            kernels.activate_multiply(activation, &x, &up, &mut product, pool);
            for i in 0..x.len() {
                let expected = exact(f64::from(x[i]));
                // In the tails the exponent carries the rounding of its size.
                let relative = 5e-7 + 2e-7 * f64::from(x[i]).powi(2).min(200.0);
                let tail = if x[i] < 0.0 { relative } else { 5e-7 };
                let name = kernels.level().name();
                assert!(
                    close(out[i], expected, tail, 1e-36),
                    "{name} {activation:?}({}) = {}, not {expected}",
                    x[i],
                    out[i]
                );
                assert_eq!(product[i], out[i] * up[i], "{name} {activation:?}");
            }
            let mut ends = [9.0; 5];
            let hostile = [f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, f32::NAN];
            kernels.activate(activation, &hostile, &mut ends, pool);
            assert_eq!(ends[..4], [f32::INFINITY, 0.0, f32::MAX, 0.0], "{activation:?}");
            assert!(ends[4].is_nan());
        });
    }
}

#[test]
fn soft_cap_is_that_of_f64() {
    let mut random = Random::new(3);
    let mut x: Vec<f32> = (0..10_001).map(|_| (random.normal() * 60.0) as f32).collect();
    x.extend([0.0, -0.0, 1e-30, 1e-5, -1e-5, 0.3, -0.3, 49.9, 1e10, -1e10, f32::INFINITY, f32::NEG_INFINITY]);
    every_level(|kernels, pool| {
        for cap in [0.5f32, 30.0, 50.0] {
            let mut capped = x.clone();
            kernels.soft_cap(cap, &mut capped, pool);
            for (&x, &capped) in x.iter().zip(&capped) {
                let expected = f64::from(cap) * (f64::from(x) / f64::from(cap)).tanh();
                assert!(close(capped, expected, 1e-6, 1e-44), "{} {x}: {capped} {expected}", kernels.level().name());
            }
        }
        let mut broken = [f32::NAN, 1.0];
        kernels.soft_cap(30.0, &mut broken, pool);
        assert!(broken[0].is_nan() && broken[1] < 1.0);
    });
}

#[test]
fn the_self_check_passes_at_every_level_and_has_room_in_its_budgets() {
    let pool = ThreadPool::with_threads(2);
    for kernels in every_kernels() {
        let checks = self_check(&kernels, &pool);
        assert!(checks.len() >= 20);
        for check in checks {
            assert!(check.ok && check.level == kernels.level(), "{check:?}");
            assert!(check.error > 0.0 && check.error < check.budget / 2.0, "{check:?}");
        }
    }
}

#[test]
fn a_level_that_this_machine_lacks_is_refused_by_name() {
    for level in CpuLevel::ALL.into_iter().filter(|level| !level.is_available()) {
        let error = Kernels::new(level).unwrap_err();
        assert_eq!(error.code, ErrorCode::CpuLevel);
        assert_eq!(error.subject, level.name());
    }
    assert_eq!(Kernels::new(CpuLevel::Scalar).unwrap().level(), CpuLevel::Scalar);
}
