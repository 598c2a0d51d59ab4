use kintsugi_runtime::{Error, ErrorCode};

/// Carries all fields of an error through the one string that a Node-API error has; `src/errors.ts` unpacks it.
pub(crate) fn to_napi(error: &Error) -> napi::Error {
    let fields = serde_json::json!({
        "code": error.code.as_str(),
        "message": error.message,
        "subject": error.subject,
        "hint": error.hint,
    });
    napi::Error::from_reason(fields.to_string())
}

/// The error of a call that met a handle after `dispose()`.
pub(crate) fn disposed(what: &str) -> Error {
    Error::new(ErrorCode::Disposed, format!("the {what} was disposed"))
        .subject(what)
        .hint("Create a new one; a disposed handle stays disposed")
}

/// The error of an option whose value is not one of a fixed list.
pub(crate) fn invalid_option(name: &str, value: &str, valid: &[&str]) -> Error {
    Error::new(ErrorCode::OptionInvalid, format!("{name} is '{value}'"))
        .subject(name)
        .hint(format!("Use one of {}", valid.join(", ")))
}
