//! The element-wise operations of a decoder block against f64, at every level.

use kintsugi_kernels::{Kernels, RotaryTable, self_check};
use kintsugi_runtime::{CpuLevel, ErrorCode, ThreadPool};
use kintsugi_testkit::{Random, matrices};

const WIDTHS: [usize; 9] = [1, 2, 7, 31, 32, 33, 100, 257, 4096];

fn every_level(mut check: impl FnMut(&Kernels, &ThreadPool)) {
    for level in CpuLevel::available() {
        for threads in [1, 3] {
            check(&Kernels::new(level).unwrap(), &ThreadPool::with_threads(threads));
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
        kernels.silu_multiply(&gate, &up, &mut out, pool);
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
        kernels.silu_multiply(&gate, &up, &mut out, pool);
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
        kernels.silu_multiply(&gate, &up, &mut all, pool);
        for start in [1, 31, 49_990] {
            let mut part = vec![0.0; 11];
            kernels.silu_multiply(&gate[start..start + 11], &up[start..start + 11], &mut part, pool);
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
    let (heads, theta) = (3, 10_000.0);
    every_level(|kernels, pool| {
        for head_dim in [2, 6, 16, 32, 64, 128] {
            let table = RotaryTable::new(head_dim, theta, 300);
            assert_eq!((table.positions(), table.head_dim()), (300, head_dim));
            let positions = [0, 1, 2, 17, 299, 5];
            let x = matrices::activations(4, positions.len(), heads * head_dim);
            let mut turned = x.clone();
            kernels.rotate(&table, &positions, heads, &mut turned, pool);
            for (row, position) in positions.iter().enumerate() {
                for head in 0..heads {
                    let start = (row * heads + head) * head_dim;
                    let (x, turned) = (&x[start..start + head_dim], &turned[start..start + head_dim]);
                    for i in 0..head_dim / 2 {
                        let (a, b) = (f64::from(x[i]), f64::from(x[i + head_dim / 2]));
                        let angle = f64::from(*position) * f64::powf(theta, -2.0 * i as f64 / head_dim as f64);
                        let budget = 3e-7 * (a.abs() + b.abs());
                        let first = a * angle.cos() - b * angle.sin();
                        let second = b * angle.cos() + a * angle.sin();
                        assert!((f64::from(turned[i]) - first).abs() <= budget, "{} {first}", turned[i]);
                        assert!((f64::from(turned[i + head_dim / 2]) - second).abs() <= budget);
                    }
                }
            }
        }
    });
}

#[test]
#[should_panic(expected = "position 4 is not in a rotary table of 4")]
fn a_position_outside_of_the_table_is_a_defect_of_the_caller() {
    let kernels = Kernels::selected().unwrap();
    kernels.rotate(&RotaryTable::new(2, 1e4, 4), &[4], 1, &mut [0.0; 2], &ThreadPool::with_threads(1));
}

#[test]
fn the_self_check_passes_at_every_level_and_has_room_in_its_budgets() {
    let pool = ThreadPool::with_threads(2);
    for level in CpuLevel::available() {
        let checks = self_check(&Kernels::new(level).unwrap(), &pool);
        assert!(checks.len() >= 20);
        for check in checks {
            assert!(check.ok && check.level == level, "{check:?}");
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
