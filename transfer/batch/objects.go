package batch

import (
	"fmt"
	"slices"
)

// Object describes an object of job files for documentation. The descriptions come from the same
// tables as the JSON Schema and the checks of a job file.
type Object struct {
	Name   string // "" for the whole file
	Help   string
	Fields []ObjectField
}

// ObjectField describes a field of an Object.
type ObjectField struct {
	Name, Help string
	Types      []string // names of JSON types, such as "integer"
	Values     []string // the only values that the field may have, as JSON; nil if there are others
}

// Objects returns all objects of a job file. The fields of a job are in two objects: those that
// only job files have, and those that stand for flags of vddkcp copy.
func Objects(spec *Spec) []Object {
	return []Object{
		{"", "A job file is a JSON object with these fields.", described(topFields)},
		{"limits", "The object limits has these fields. A field that is missing has the value in parentheses, or sets no limit.", described(limitFields)},
		{"job", "Each object in the list jobs is a job. A job has these fields, and those in the next section. The object defaults has the same fields, except name.", described(jobFields)},
		{"flags of a job", "These fields of a job set flags of vddkcp copy. A field has the name of its flag, with _ in place of -.", described(flagFields(spec))},
	}
}

func described(fields []field) (all []ObjectField) {
	for _, f := range fields {
		d := ObjectField{Name: f.name}
		d.Help, _ = f.schema["description"].(string)
		switch types := f.schema["type"].(type) {
		case string:
			d.Types = []string{types}
		case []string:
			d.Types = slices.Clone(types)
		default: // a constant, or a reference to the schema of an object
			d.Types = []string{"object"}
			if constant, ok := f.schema["const"]; ok {
				d.Types, d.Values = []string{"integer"}, []string{fmt.Sprint(constant)}
			}
		}
		if enum, ok := f.schema["enum"].([]any); ok {
			for _, v := range enum {
				d.Values = append(d.Values, fmt.Sprint(v))
			}
		}
		if item, ok := f.schema["items"].(schema); ok {
			switch item["type"] {
			case "string":
				d.Types[0] = "array of strings"
			default:
				d.Types[0] = "array of objects"
			}
		}
		all = append(all, d)
	}
	return all
}
