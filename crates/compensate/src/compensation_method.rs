use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};

use crate::diagonal::Diagonal;
use crate::exact::Exact;
use crate::fast::Fast;
use crate::lorc::Lorc;
use crate::{OutputDirections, Residual};

/// How the directions of a compensation are chosen.
///
/// Every method here gives orthonormal directions `U_r` in the space of outputs, and the compensation is the
/// projection `U_r U_rᵀ Δ`: so none of them makes any input worse, whatever its idea of what inputs look like.
pub trait CompensationMethod: Sync {
    /// Name in options and reports.
    fn name(&self) -> &'static str;

    /// Whether no other directions leave less error on the calibration inputs; such a method has to prove it.
    fn is_optimal(&self) -> bool;

    /// Up to `rank` directions, the most important first.
    ///
    /// # Errors
    /// `ERR_SOLVER_FAILED`.
    fn directions(&self, residual: &Residual<'_>, rank: usize, pool: &ThreadPool) -> Result<OutputDirections>;
}

/// Every method; the first is the default.
pub const METHODS: [&dyn CompensationMethod; 4] = [&Fast, &Exact, &Diagonal, &Lorc];

/// The method of that name.
///
/// # Errors
/// `ERR_OPTION_INVALID`, naming the valid ones.
pub fn compensation_method(name: &str) -> Result<&'static dyn CompensationMethod> {
    METHODS.into_iter().find(|method| method.name() == name).ok_or_else(|| {
        let names: Vec<&str> = METHODS.iter().map(|method| method.name()).collect();
        Error::new(ErrorCode::OptionInvalid, format!("there is no way '{name}' to solve a compensation"))
            .subject("eora.solver")
            .hint(format!("Use one of {}", names.join(", ")))
    })
}
