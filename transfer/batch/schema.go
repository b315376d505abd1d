package batch

import (
	"encoding/json"
	"slices"
)

// field is a field of job files, together with its JSON Schema. It does not stand for a flag of
// a copy.
type field struct {
	name   string
	schema schema
}

type schema = map[string]any

func names(fields []field) []string {
	var all []string
	for _, f := range fields {
		all = append(all, f.name)
	}
	return all
}

// Patterns for Field.Pattern. SizePattern is for a size or a number of bytes per second,
// TimePattern for a duration.
const (
	SizePattern = `^[0-9]+([BbKkMmGgTtPpEe]|[KkMmGgTtPpEe][Ii][Bb])?(/s)?$`
	TimePattern = `^[+]?([0-9]*[.]?[0-9]*(ns|us|µs|μs|ms|s|m|h))+$`
)

func ofString(help string) schema { return schema{"type": "string", "description": help} }

func ofStrings(help string) schema {
	return schema{"type": "array", "items": schema{"type": "string"}, "description": help}
}

func ofCommand(help string) schema {
	s := ofStrings(help)
	s["minItems"] = 1
	return s
}

func ofCount(least int, help string) schema {
	return schema{"type": "integer", "minimum": least, "description": help}
}

func ofSize(help string) schema {
	return schema{"type": []string{"integer", "string"}, "minimum": 1, "pattern": SizePattern, "description": help}
}

// These are the fields of a job file that do not stand for flags of a copy.
var (
	topFields = []field{
		{"version", schema{"const": 1, "description": "The version of job files."}},
		{"defaults", schema{"$ref": "#/$defs/defaults", "description": "Fields for all jobs that do not have these fields themselves."}},
		{"limits", schema{"$ref": "#/$defs/limits", "description": "Limits for all jobs together."}},
		{"continue_on_error", schema{"type": "boolean", "default": true, "description": "Whether other jobs start after a job has failed."}},
		{"jobs", schema{"type": "array", "minItems": 1, "description": "The copies to run.", "items": schema{"$ref": "#/$defs/job"}}},
	}
	limitFields = []field{
		{"total", ofCount(1, "Number of disks that are copied at the same time (4).")},
		{"per_server", ofCount(1, "Number of disks that are copied at the same time from each server.")},
		{"per_host", ofCount(1, "Number of disks that are copied at the same time from each ESXi host.")},
		{"nfc_buffer", ofSize("Memory that all connections to an ESXi host together may reserve there (32MiB).")},
		{"connections", ofCount(1, "Number of connections to each ESXi host (48).")},
		{"rate", ofSize("Maximum number of bytes that all jobs together read per second.")},
		{"rounds", ofCount(0, "How often jobs with a temporary failure are tried again after all others (2); 0: never.")},
	}
	jobFields = []field{
		{"name", schema{"type": "string", "minLength": 1, "description": "Name of the job, unique in the file; default: the position of the job, counted from 0."}},
		{"source", ofString("The disk to copy: an address as SRC of vddkcp copy.")},
		{"target", ofString("Where to copy it: an address as DST of vddkcp copy.")},
		{"host", ofString("The ESXi host that has the disk. Only the limits use it.")},
		{"labels", schema{"type": "object", "additionalProperties": schema{"type": "string"}, "description": "Labels for --label and for the report."}},
		{"before", ofCommand("A program and its arguments, run before the copy. If it fails, the job fails.")},
		{"after", ofCommand("A program and its arguments, run after the copy, even if the copy failed.")},
		{"hook_timeout", schema{"type": "string", "pattern": TimePattern, "description": "Maximum duration of each of the two commands (1h)."}},
	}
)

// Schema returns the JSON Schema of job files.
func Schema(spec *Spec) []byte {
	object := func(fields []field) schema {
		properties := schema{}
		for _, f := range fields {
			properties[f.name] = f.schema
		}
		return schema{"type": "object", "additionalProperties": false, "properties": properties}
	}
	flags := slices.Concat(jobFields, flagFields(spec))
	top := object(topFields)
	top["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	top["title"] = "Job file of vddkcp run"
	top["required"] = []string{"version", "jobs"}
	top["$defs"] = schema{
		"job":      object(flags),
		"defaults": object(slices.DeleteFunc(slices.Clone(flags), func(f field) bool { return f.name == "name" })),
		"limits":   object(limitFields),
	}
	// Each job must have a source, in the job itself or in the defaults. The same is true of the
	// target.
	var either []schema
	for _, name := range []string{"source", "target"} {
		either = append(either, schema{"anyOf": []schema{
			{"required": []string{"defaults"}, "properties": schema{"defaults": schema{"required": []string{name}}}},
			{"properties": schema{"jobs": schema{"items": schema{"required": []string{name}}}}},
		}})
	}
	top["allOf"] = either
	text, err := json.MarshalIndent(top, "", "  ")
	if err != nil {
		panic(err) // a schema has only values that can be marshalled
	}
	return append(text, '\n')
}

// flagFields returns the fields of a job that stand for flags of a copy.
func flagFields(spec *Spec) (fields []field) {
	for i := range spec.Fields {
		fields = append(fields, field{spec.Fields[i].Name, spec.Fields[i].schema()})
	}
	return fields
}

func (f *Field) schema() schema {
	s := schema{"description": f.Help}
	switch f.Type {
	case Boolean:
		s["type"] = "boolean"
	case Integer:
		s["type"] = "integer"
	case Text:
		s["type"] = "string"
	case IntOrText:
		s["type"] = []string{"integer", "string"}
	case BoolOrText:
		s["type"] = []string{"boolean", "string"}
	case Array:
		s["type"], s["items"] = "array", schema{"type": "string"}
	}
	if f.Pattern != "" {
		s["pattern"] = f.Pattern
	}
	if f.Type == Integer || f.Type == IntOrText {
		s["minimum"] = f.Least
	}
	if len(f.Enum) > 0 {
		var values []any
		for _, e := range f.Enum {
			values = append(values, e)
		}
		if f.Type == BoolOrText {
			values = append(values, true, false)
		}
		s["enum"] = values
	}
	return s
}
