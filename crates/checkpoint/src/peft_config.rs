use std::path::Path;

use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::Adapter;
use serde_json::{Map, Value, json};

use crate::module_pattern::{ModulePattern, PatternTable};
use crate::positional_file::read_bounded;

/// Largest `adapter_config.json` that is read.
const CONFIG_LIMIT: u64 = 16_000_000;

/// Fields that change what the factors mean; an adapter that uses one is refused. Empty, false and null are fine.
const VARIANTS: &[(&str, &str)] = &[
    ("use_dora", "DoRA magnitudes"),
    ("use_qalora", "QALoRA"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("layer_replication", "replicated layers"),
    ("target_parameters", "parameters that are not Linears"),
    ("trainable_token_indices", "trained token embeddings"),
    ("alora_invocation_tokens", "activated LoRA"),
    ("arrow_config", "Arrow routing"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
    ("megatron_config", "Megatron layers"),
    ("velora_config", "VeLoRA"),
];

/// Initialisations that change the weights of the base model, without which the factors are meaningless.
const BASE_CHANGING_INITS: &[&str] = &["pissa", "olora", "corda", "lora_ga", "loftq"];

/// What `adapter_config.json` says about the factors.
///
/// Format: `LoraConfig` of <https://github.com/huggingface/peft>. A module's rank and alpha are those of the first
/// pattern that matches it, else the common ones; its scaling is `alpha / rank`, or `alpha / √rank` for rsLoRA.
#[derive(Debug)]
pub(crate) struct PeftConfig {
    rank: usize,
    alpha: f64,
    rank_stabilized: bool,
    rank_pattern: PatternTable<usize>,
    alpha_pattern: PatternTable<f64>,
    pub(crate) base_model: Option<String>,
    pub(crate) task_type: Option<String>,
    /// The base keeps the adapted weights as `[in, out]`. The factors have the same orientation all the same.
    pub(crate) fan_in_fan_out: bool,
    /// Every module has a bias beside B, which is multiplied with the scaling as B is.
    pub(crate) lora_bias: bool,
    /// Modules that are saved whole: the ends of their paths.
    pub(crate) modules_to_save: Vec<String>,
    /// `target_modules` is a list of last parts of paths, and no layers are left out.
    pub(crate) targets_by_suffix: bool,
}

impl PeftConfig {
    /// The name of the file.
    pub(crate) const FILE_NAME: &'static str = "adapter_config.json";

    /// Reads `adapter_config.json`.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when it is missing, is not JSON, is not a plain LoRA, or has real regular expressions.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let invalid = |message: String, hint: &str| {
            Error::new(ErrorCode::AdapterInvalid, message).subject(path.display()).hint(hint)
        };
        let bytes = read_bounded(path, CONFIG_LIMIT).map_err(|error| {
            invalid(format!("the file cannot be read: {error}"), "Give the folder of a PEFT adapter")
        })?;
        let config: Map<String, Value> = serde_json::from_slice(&bytes)
            .map_err(|error| invalid(format!("the file is not a JSON object: {error}"), "Save the adapter again"))?;
        Self::from_json(&config).map_err(|(message, hint)| invalid(message, hint))
    }

    fn from_json(config: &Map<String, Value>) -> Result<Self, (String, &'static str)> {
        const MERGE: &str = "Merge it into the base model with PEFT, or train a plain LoRA";
        const SAVE_AGAIN: &str = "The file is damaged; save the adapter again with PEFT";

        match config.get("peft_type") {
            Some(Value::String(kind)) if kind == "LORA" => {}
            Some(kind) => return Err((format!("the adapter is of type {kind}, only LORA is supported"), MERGE)),
            None => return Err(("'peft_type' is missing".into(), "Give a PEFT adapter folder")),
        }
        for (field, meaning) in VARIANTS {
            if config.get(*field).is_some_and(is_set) {
                return Err((format!("'{field}' is set: {meaning} are not supported"), MERGE));
            }
        }
        if config.get("bias").is_some_and(|bias| bias != "none" && !bias.is_null()) {
            return Err(("'bias' is not \"none\": trained biases are not supported".into(), MERGE));
        }
        if let Some(Value::String(init)) = config.get("init_lora_weights")
            && BASE_CHANGING_INITS.iter().any(|changing| init.starts_with(changing))
        {
            let message = format!("'init_lora_weights' is \"{init}\", which changes the base model");
            return Err((message, "Save the adapter with path_initial_model_for_weight_conversion"));
        }

        let rank = config.get("r").and_then(as_rank).ok_or(("'r' is not a positive number".into(), SAVE_AGAIN))?;
        let alpha =
            config.get("lora_alpha").and_then(as_alpha).ok_or(("'lora_alpha' is not a number".into(), SAVE_AGAIN))?;
        let flag = |field: &str| match config.get(field) {
            None | Some(Value::Null) => Ok(false),
            Some(flag) => flag.as_bool().ok_or((format!("'{field}' is not true or false"), SAVE_AGAIN)),
        };
        let (rank_stabilized, lora_bias) = (flag("use_rslora")?, flag("lora_bias")?);
        Ok(PeftConfig {
            rank,
            alpha,
            rank_stabilized,
            rank_pattern: patterns(config, "rank_pattern", as_rank)?,
            alpha_pattern: patterns(config, "alpha_pattern", as_alpha)?,
            base_model: text(config, "base_model_name_or_path"),
            task_type: text(config, "task_type"),
            fan_in_fan_out: config.get("fan_in_fan_out") == Some(&Value::Bool(true)),
            lora_bias,
            modules_to_save: modules_to_save(config)
                .ok_or(("'modules_to_save' is not a list of names".into(), SAVE_AGAIN))?,
            targets_by_suffix: targets_by_suffix(config),
        })
    }

    /// Whether the tensor of that path (`lm_head.weight`) is part of a module that is saved whole.
    pub(crate) fn saves_whole(&self, tensor: &str) -> bool {
        let modules = tensor.match_indices('.').map(|(at, _)| &tensor[..at]);
        modules.into_iter().any(|module| {
            let ends_with = |name: &String| {
                module.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            };
            self.modules_to_save.iter().any(ends_with)
        })
    }

    /// Columns of B and rows of A of the module.
    pub(crate) fn rank(&self, module: &str) -> usize {
        self.rank_pattern.first_match(module).unwrap_or(self.rank)
    }

    /// What B·A is multiplied with.
    pub(crate) fn scaling(&self, module: &str) -> f64 {
        let alpha = self.alpha_pattern.first_match(module).unwrap_or(self.alpha);
        let rank = self.rank(module) as f64;
        if self.rank_stabilized { alpha / rank.sqrt() } else { alpha / rank }
    }

    /// `adapter_config.json` for `adapter`.
    ///
    /// Every rank stands in `rank_pattern` under the full module path and every alpha, `scaling · rank`, in
    /// `alpha_pattern`, so that PEFT computes exactly the scaling of each module; at scaling 1 the two maps are
    /// identical. `r` is the largest rank and `lora_alpha` what it has as alpha: readers that know no patterns (vLLM)
    /// are right wherever all modules share one scaling, as those of a compensation do.
    pub(crate) fn to_json(adapter: &Adapter, base_model: &str) -> Value {
        let mut ranks = Map::new();
        let mut alphas = Map::new();
        let mut targets = std::collections::BTreeSet::new();
        let (mut largest, mut alpha_of_largest) = (0, json!(0));
        for (name, entry) in &adapter.linears {
            let rank = entry.factors.rank();
            // The product of an f32 and a rank is exact in f64, and so is the way back.
            let alpha = f64::from(entry.scaling) * rank as f64;
            let alpha = if alpha.fract() == 0.0 && alpha.abs() < 1e9 { json!(alpha as i64) } else { json!(alpha) };
            if rank > largest {
                (largest, alpha_of_largest) = (rank, alpha.clone());
            }
            ranks.insert(name.clone(), json!(rank));
            alphas.insert(name.clone(), alpha);
            targets.insert(name.rsplit('.').next().unwrap_or(name));
        }
        let mut config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "revision": null,
            "auto_mapping": null,
            "inference_mode": true,
            "r": largest,
            "lora_alpha": alpha_of_largest,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "use_rslora": false,
            "use_dora": false,
            "modules_to_save": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "target_modules": targets,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        });
        if adapter.linears.values().any(|entry| entry.factors.bias().is_some()) {
            config["lora_bias"] = json!(true);
        }
        config
    }
}

fn text(config: &Map<String, Value>, field: &str) -> Option<String> {
    config.get(field).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_string)
}

fn modules_to_save(config: &Map<String, Value>) -> Option<Vec<String>> {
    match config.get("modules_to_save") {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(names)) => {
            let name = |name: &Value| name.as_str().filter(|name| !name.is_empty()).map(str::to_string);
            names.iter().map(name).collect()
        }
        Some(_) => None,
    }
}

fn targets_by_suffix(config: &Map<String, Value>) -> bool {
    let suffixes = config.get("target_modules").and_then(Value::as_array).is_some_and(|targets| {
        targets.iter().all(|target| target.as_str().is_some_and(|target| !target.contains('.')))
    });
    suffixes && !["layers_to_transform", "exclude_modules"].iter().any(|field| config.get(*field).is_some_and(is_set))
}

fn patterns<T: Copy>(
    config: &Map<String, Value>,
    field: &str,
    parse: impl Fn(&Value) -> Option<T>,
) -> Result<PatternTable<T>, (String, &'static str)> {
    let map = match config.get(field) {
        None | Some(Value::Null) => return Ok(PatternTable::new([])),
        Some(Value::Object(map)) => map,
        Some(_) => return Err((format!("'{field}' is not an object"), "Save the adapter again with PEFT")),
    };
    let patterns: Vec<(ModulePattern, T)> = map
        .iter()
        .map(|(key, value)| {
            let pattern = ModulePattern::parse(key).ok_or_else(|| {
                let message = format!("'{field}' holds the regular expression '{key}'");
                (message, "Write one entry with a plain module name for each module")
            })?;
            let value = parse(value)
                .ok_or_else(|| (format!("'{field}' of '{key}' is not a number"), "Save the adapter again with PEFT"))?;
            Ok((pattern, value))
        })
        .collect::<Result<_, (String, &'static str)>>()?;
    Ok(PatternTable::new(patterns))
}

fn as_rank(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|rank| usize::try_from(rank).ok()).filter(|&rank| rank > 0)
}

fn as_alpha(value: &Value) -> Option<f64> {
    value.as_f64().filter(|alpha| alpha.is_finite())
}

fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(entries) => !entries.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
        _ => true,
    }
}
