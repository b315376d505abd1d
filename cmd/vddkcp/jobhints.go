package main

import (
	"context"
	"log/slog"
	"regexp"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// Messages and hints of a copy name flags, such as --force. In a batch the same message must name
// the field of the job file, "force": true. All texts about the copy of a job pass through the type
// jobTexts, so that packages that make messages need not know batches.
type jobTexts struct {
	fields map[string]*batch.Field // by the names of flags
}

// newJobTexts returns the jobTexts for the given fields of jobs.
func newJobTexts(spec *batch.Spec) *jobTexts {
	t := &jobTexts{fields: map[string]*batch.Field{}}
	for i, f := range spec.Fields {
		t.fields[strings.ReplaceAll(f.Name, "_", "-")] = &spec.Fields[i]
	}
	return t
}

var (
	// flagInText matches a flag, and the word behind it, which may be its value.
	flagInText = regexp.MustCompile(`--([a-z][a-z0-9-]*[a-z0-9])(?:([ =])('[^']*'|[^\s,;()]+))?`)
	// ofCommand matches the beginning of a text in which flags belong to another command line.
	ofCommand = regexp.MustCompile(`(?:^|[ (])(?:vddkcp|nbdkit|qemu-img|ntfsclone|tar|ln) [^;]*$`)
	// startOver matches how a single copy starts over. In a batch, a job whose field force is true
	// starts over by itself.
	startOver = regexp.MustCompile(`--force and without --resume|--resume and --force`)
	// namedValue matches names that messages give as values of fields that take any text.
	namedValue = regexp.MustCompile(`^(?:raw|qcow2|vmdk|none|zlib(?::[0-9]+)?|zstd(?::[0-9]+)?)$`)
	// placeholder matches a word that stands for a value in a message.
	placeholder = regexp.MustCompile(`^[A-Z][A-Z/]+$`)
)

// The method of returns a text in which the flags of a copy are replaced by fields of a job. Flags
// that are no fields, such as --resume, belong to the batch and stay.
func (t *jobTexts) of(text string) string {
	if !strings.Contains(text, "--") {
		return text
	}
	text = startOver.ReplaceAllString(text, "--force")
	var b strings.Builder
	end := 0
	for _, m := range flagInText.FindAllStringSubmatchIndex(text, -1) {
		f := t.fields[text[m[2]:m[3]]]
		if f == nil || ofCommand.MatchString(text[:m[0]]) {
			continue
		}
		before := text[end:m[0]]
		for _, word := range []string{"the option ", "the flag "} {
			before = strings.TrimSuffix(before, word) // the name of the field stands for itself
		}
		b.WriteString(before)
		end = m[3]
		if m[4] < 0 {
			b.WriteString(fieldText(f, ""))
			continue
		}
		word := strings.TrimRight(text[m[6]:m[7]], ".:")
		if isValue(f, word) || text[m[4]:m[5]] == "=" {
			b.WriteString(fieldText(f, word))
			end = m[6] + len(word)
		} else {
			b.WriteString(fieldText(f, ""))
		}
	}
	b.WriteString(text[end:])
	return b.String()
}

// isValue reports whether the word after a flag in a text is the value of the flag and not the next
// word of the sentence.
func isValue(f *batch.Field, word string) bool {
	switch {
	case f.Type == batch.Boolean || word == "":
		return false
	case placeholder.MatchString(word) || strings.ContainsAny(word, "/='"):
		return true
	case slices.Contains(f.Enum, word) || namedValue.MatchString(word):
		return true
	}
	// Every text is valid for a field that takes texts.
	return f.Type != batch.Text && f.Type != batch.Array && len(f.Enum) == 0 && f.Check != nil && f.Check(word) == nil
}

// fieldText returns a field as a job file has it. If the value is "", it returns only the name,
// unless the field can have no other value than true.
func fieldText(f *batch.Field, value string) string {
	name := `"` + f.Name + `"`
	value = strings.Trim(value, "'")
	switch {
	case f.Type == batch.Boolean:
		return name + ": true"
	case value == "":
		return "the field " + name
	case f.Type == batch.Array:
		return name + `: ["` + value + `"]`
	case (f.Type == batch.Integer || f.Type == batch.IntOrText) && strings.Trim(value, "0123456789") == "":
		return name + ": " + value
	}
	return name + `: "` + value + `"`
}

// jobError is the error of a job of a batch, with texts that fit a batch.
type jobError struct {
	error
	text, hint string
}

func (e *jobError) Unwrap() error { return e.error }
func (e *jobError) Error() string { return e.text }
func (e *jobError) Hint() string  { return e.hint }

// The method error returns err with texts that fit a batch.
func (t *jobTexts) error(err error) error {
	if err == nil {
		return nil
	}
	return &jobError{err, t.of(err.Error()), t.of(hinted.Of(err))}
}

// The method report changes the texts of the report of a copy. The report may be nil.
func (t *jobTexts) report(r *report.Report) {
	if r == nil {
		return
	}
	r.Error, r.Hint = t.of(r.Error), t.of(r.Hint)
	for i, w := range r.Warnings {
		r.Warnings[i] = t.of(w)
	}
}

// The method log returns a log for the copy of a job, which passes messages on to the given log.
func (t *jobTexts) log(log *slog.Logger) *slog.Logger {
	return slog.New(&jobLogHandler{log.Handler(), t})
}

// jobLogHandler changes the texts of log messages.
type jobLogHandler struct {
	slog.Handler
	texts *jobTexts
}

// Handle implements slog.Handler.
func (h *jobLogHandler) Handle(ctx context.Context, r slog.Record) error {
	r.Message = h.texts.of(r.Message)
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h *jobLogHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &jobLogHandler{h.Handler.WithAttrs(attrs), h.texts}
}

// WithGroup implements slog.Handler.
func (h *jobLogHandler) WithGroup(name string) slog.Handler {
	return &jobLogHandler{h.Handler.WithGroup(name), h.texts}
}
