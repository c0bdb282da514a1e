//! Text to token ids and back, by the tokenizer inside the GGUF file.

use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use std::error::Error;
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;

/// SmolLM2's tokenizer.
pub struct Tokens(Tokenizer);

impl Tokens {
    /// From the file's metadata.
    pub fn new(content: &Content) -> candle_core::Result<Self> {
        let mut tokenizer = Tokenizer::from_gguf(content)?;
        // Candle does not know the file's kind, "smollm": digits one by one, and no space before the first word.
        let split = Sequence::new(vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()]);
        tokenizer.with_pre_tokenizer(Some(split));
        Ok(Tokens(tokenizer))
    }

    /// The ids of a text, without any special token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Box<dyn Error>> {
        Ok(self.0.encode_fast(text, false).map_err(|e| e.to_string())?.get_ids().to_vec())
    }

    /// Turns ids back into text as they come.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder { tokens: self, ids: Vec::new() }
    }
}

/// Ids that are not yet whole characters.
pub struct Decoder<'a> {
    tokens: &'a Tokens,
    ids: Vec<u32>,
}

impl Decoder<'_> {
    /// The text that one more id completes.
    pub fn next(&mut self, id: u32) -> Result<String, Box<dyn Error>> {
        self.ids.push(id);
        let text = self.tokens.0.decode(&self.ids, false).map_err(|e| e.to_string())?;
        if text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.ids.clear();
        Ok(text)
    }
}
