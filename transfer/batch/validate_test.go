package batch_test

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// validate returns what in a value violates a JSON Schema, or "". It knows the
// keywords that Schema uses. An unknown keyword counts as a violation, so that no
// keyword can be forgotten here.
func validate(root, schema map[string]any, value any, at string) string {
	for word, want := range schema {
		if problem := validateWord(root, schema, word, want, value, at); problem != "" {
			return problem
		}
	}
	return ""
}

func validateWord(root, schema map[string]any, word string, want, value any, at string) string {
	object, isObject := value.(map[string]any)
	array, isArray := value.([]any)
	text, isText := value.(string)
	number, isNumber := value.(float64)
	switch word {
	case "$schema", "$defs", "title", "description", "default":
	case "$ref":
		name := strings.TrimPrefix(want.(string), "#/$defs/")
		return validate(root, root["$defs"].(map[string]any)[name].(map[string]any), value, at)
	case "type":
		kinds, ok := want.([]any)
		if !ok {
			kinds = []any{want}
		}
		kind := map[bool]string{isObject: "object", isArray: "array", isText: "string"}[true]
		switch value.(type) {
		case bool:
			kind = "boolean"
		case float64:
			kind = "number"
			if number == math.Trunc(number) {
				kind = "integer"
			}
		}
		if !slices.Contains(kinds, any(kind)) {
			return fmt.Sprintf("%s: type %s, want %v", at, kind, want)
		}
	case "const":
		if !reflect.DeepEqual(value, want) {
			return at + ": const"
		}
	case "enum":
		if !slices.Contains(want.([]any), value) {
			return at + ": enum"
		}
	case "properties":
		for name, s := range want.(map[string]any) {
			if v, ok := object[name]; ok {
				if problem := validate(root, s.(map[string]any), v, at+"."+name); problem != "" {
					return problem
				}
			}
		}
	case "additionalProperties":
		known, _ := schema["properties"].(map[string]any)
		for name, v := range object {
			if _, ok := known[name]; ok {
				continue
			}
			if want == false {
				return at + "." + name + ": not known"
			}
			if problem := validate(root, want.(map[string]any), v, at+"."+name); problem != "" {
				return problem
			}
		}
	case "required":
		for _, name := range want.([]any) {
			if _, ok := object[name.(string)]; isObject && !ok {
				return fmt.Sprintf("%s.%v: missing", at, name)
			}
		}
	case "items":
		for i, v := range array {
			if problem := validate(root, want.(map[string]any), v, fmt.Sprintf("%s[%d]", at, i)); problem != "" {
				return problem
			}
		}
	case "minItems":
		if isArray && float64(len(array)) < want.(float64) {
			return at + ": too few"
		}
	case "minLength":
		if isText && float64(utf8.RuneCountInString(text)) < want.(float64) {
			return at + ": too short"
		}
	case "minimum":
		if isNumber && number < want.(float64) {
			return at + ": too small"
		}
	case "pattern":
		if isText && !regexp.MustCompile(want.(string)).MatchString(text) {
			return at + ": pattern"
		}
	case "allOf":
		for _, s := range want.([]any) {
			if problem := validate(root, s.(map[string]any), value, at); problem != "" {
				return problem
			}
		}
	case "anyOf":
		problem := ""
		for _, s := range want.([]any) {
			if problem = validate(root, s.(map[string]any), value, at); problem == "" {
				return ""
			}
		}
		return problem
	default:
		return "the schema has " + word + ", which this does not know"
	}
	return ""
}

// TestExamplesAreValid checks all job files among the examples against the shipped
// schema.
func TestExamplesAreValid(t *testing.T) {
	const examples = "../../examples"
	text, err := os.ReadFile(filepath.Join(examples, "jobs.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	schema := decode(t, text)
	found := 0
	err = filepath.WalkDir(examples, func(path string, _ os.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".json" || filepath.Base(path) == "jobs.schema.json" {
			return err
		}
		if text, err = os.ReadFile(path); err != nil {
			return err
		}
		found++
		if problem := validate(schema, schema, decode(t, text), ""); problem != "" {
			t.Errorf("%s: %s", path, problem)
		}
		return nil
	})
	if err != nil || found == 0 {
		t.Errorf("%d job files, %v", found, err)
	}
	misspelt := decode(t, []byte(`{"version":1,"jobs":[{"source":"a","target":"b","compres":"zlib"}]}`))
	if validate(schema, schema, misspelt, "") == "" {
		t.Error("the schema takes a field that there is not")
	}
}
