use std::collections::BTreeMap;

use kintsugi_checkpoint::Checkpoint;
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result};
use kintsugi_weights::Adapter;

use crate::model_weights::check_factors;
use crate::{
    Backend, Batch, Block, BlockWeights, CompensationChoice, DecoderSpec, Embedding, Head, ModelWeights, RotaryTables,
    Session, Tokenizer, attach_compensation, read_tokenizer,
};

/// A whole decoder on one backend.
pub struct Model<B: Backend> {
    spec: DecoderSpec,
    backend: B,
    tokenizer: Tokenizer,
    embedding: Embedding,
    blocks: Vec<Block<B>>,
    head: Head<B>,
    adapters: Vec<String>,
}

impl<B: Backend> Model<B> {
    /// Reads and packs a checkpoint block by block; the factors of `compensation` go into the products.
    ///
    /// # Errors
    /// What reading, the configuration or packing reports; `ERR_CANCELLED`.
    pub fn load(
        checkpoint: &Checkpoint,
        backend: B,
        compensation: &CompensationChoice,
        cancel: &CancelToken,
        progress: &Progress,
    ) -> Result<Self> {
        let spec = DecoderSpec::of(checkpoint)?;
        progress.begin("load", spec.layers as u64 + 1);
        let tokenizer = read_tokenizer(checkpoint, &spec)?;
        let factors = compensation.read(checkpoint)?;
        let outside = ModelWeights::read(checkpoint, &spec)?;
        let mut model = Self::without_blocks(spec, backend, tokenizer, &outside)?;
        progress.advance(1);
        for block in 0..model.spec.layers {
            cancel.check()?;
            progress.at("load", model.spec.block_name(block));
            let mut weights = BlockWeights::read(checkpoint, &model.spec, block)?;
            if let Some(factors) = &factors {
                attach_compensation(&model.spec, block, &mut weights, factors)?;
            }
            model.push_block(&weights)?;
            progress.advance(1);
        }
        Ok(model)
    }

    /// A model that still lacks its blocks; [`Model::push_block`] adds them in order.
    ///
    /// # Errors
    /// What the backend reports when a weight cannot be packed.
    pub fn without_blocks(spec: DecoderSpec, backend: B, tokenizer: Tokenizer, weights: &ModelWeights) -> Result<Self> {
        Ok(Model {
            head: Head::prepare(&backend, &spec, &weights.final_norm, &weights.head())?,
            embedding: weights.embedding.clone(),
            blocks: Vec::with_capacity(spec.layers),
            adapters: Vec::new(),
            tokenizer,
            backend,
            spec,
        })
    }

    /// Packs the next block.
    ///
    /// # Errors
    /// What the backend reports when a weight cannot be packed.
    pub fn push_block(&mut self, weights: &BlockWeights) -> Result<()> {
        self.blocks.push(Block::prepare(&self.backend, &self.spec, self.blocks.len(), weights)?);
        Ok(())
    }

    /// Makes a LoRA adapter available to requests under `name`.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when it updates a Linear that the model lacks, or with another shape, or has biases.
    pub fn add_adapter(&mut self, name: &str, adapter: &Adapter) -> Result<()> {
        let mut used = 0;
        let mut updates = Vec::with_capacity(self.blocks.len());
        for block in 0..self.blocks.len() {
            let mut of_block = Vec::with_capacity(self.spec.linears.len());
            for linear in &self.spec.linears {
                let name = self.spec.linear_name(block, linear);
                let Some(entry) = adapter.linears.get(&name) else {
                    of_block.push(None);
                    continue;
                };
                check_factors(&name, (linear.rows, linear.columns), &entry.factors)?;
                if entry.factors.bias().is_some() {
                    let message = "the adapter has a bias beside B, which adapters of requests cannot have";
                    return Err(Error::new(ErrorCode::AdapterInvalid, message)
                        .subject(name)
                        .hint("Load it as compensation of the model"));
                }
                of_block.push(Some(self.backend.prepare_low_rank(&entry.factors, entry.scaling)?));
                used += 1;
            }
            updates.push(of_block);
        }
        if used != adapter.linears.len() {
            let known = |name: &String| {
                (0..self.spec.layers)
                    .any(|block| self.spec.linears.iter().any(|linear| self.spec.linear_name(block, linear) == *name))
            };
            let stranger = adapter.linears.keys().find(|name| !known(name)).cloned().unwrap_or_default();
            return Err(Error::new(
                ErrorCode::AdapterInvalid,
                format!("adapter '{name}' updates a Linear that the model does not have"),
            )
            .subject(stranger)
            .hint("Use an adapter that was made for this base model"));
        }
        for (block, of_block) in self.blocks.iter_mut().zip(updates) {
            block.push_adapter(of_block);
        }
        self.adapters.push(name.to_owned());
        Ok(())
    }

    /// The index of a loaded adapter.
    ///
    /// # Errors
    /// `ERR_ADAPTER_UNKNOWN`, with the names that are loaded.
    pub fn adapter_index(&self, name: &str) -> Result<usize> {
        self.adapters.iter().position(|adapter| adapter == name).ok_or_else(|| {
            let hint = if self.adapters.is_empty() {
                "Load it first: loadModel(path, { adapters: { name: folder } })".to_owned()
            } else {
                format!("Loaded are: {}", self.adapters.join(", "))
            };
            Error::new(ErrorCode::AdapterUnknown, format!("no adapter named '{name}' is loaded"))
                .subject(name)
                .hint(hint)
        })
    }

    /// Names of the loaded adapters.
    pub fn adapters(&self) -> &[String] {
        &self.adapters
    }

    /// What the model is.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Where it computes.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Text to tokens and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The blocks, in order.
    pub fn blocks(&self) -> &[Block<B>] {
        &self.blocks
    }

    /// Bytes of the packed weights, embedding included.
    pub fn memory_bytes(&self) -> usize {
        let blocks: usize = self.blocks.iter().map(|block| block.memory_bytes(&self.backend)).sum();
        blocks + self.embedding.memory_bytes() + self.head.memory_bytes(&self.backend)
    }

    /// How many Linears have their products computed in which arithmetic, the head, routers and gates of shared experts
    /// among them: what a precision comes to with these weights on this machine.
    pub fn arithmetic(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        let blocks = self.blocks.iter().flat_map(|block| block.arithmetic(&self.backend));
        for arithmetic in blocks.chain([self.head.arithmetic(&self.backend)]) {
            *counts.entry(arithmetic.name()).or_default() += 1;
        }
        counts
    }

    /// Runs the rows of `batch`, one token per row, through all blocks; the result stays in `session`.
    ///
    /// # Errors
    /// `ERR_INTERNAL` for a token outside the vocabulary; `ERR_CANCELLED`, checked before every block.
    pub fn forward(&self, session: &mut Session<B>, tokens: &[u32], batch: &Batch, cancel: &CancelToken) -> Result<()> {
        let embedded = self.embedding.embed(tokens, batch.positions())?;
        self.backend.upload(&embedded, &mut session.hidden)?;
        let rotary = RotaryTables::new(&self.backend, &self.spec, batch)?;
        for (block, cache) in self.blocks.iter().zip(&mut session.caches) {
            cancel.check()?;
            block.forward(
                &self.backend,
                &rotary,
                batch,
                &mut session.hidden,
                cache,
                &mut session.workspace,
                &mut |_| Ok(()),
            )?;
        }
        Ok(())
    }

    /// Logits `[rows.len(), vocabularySize]` of the given rows of the last [`Model::forward`].
    ///
    /// # Errors
    /// What the backend reports.
    pub fn logits<'a>(
        &self,
        session: &'a mut Session<B>,
        rows: std::ops::Range<usize>,
    ) -> Result<std::borrow::Cow<'a, [f32]>> {
        let width = self.spec.hidden_size;
        {
            let hidden = self.backend.download(&session.hidden)?;
            let selected = &hidden[rows.start * width..rows.end * width];
            self.backend.upload(selected, &mut session.head.selected)?;
        }
        self.head.logits(&self.backend, rows.len(), &mut session.head)
    }
}
