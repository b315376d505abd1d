package batch_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"testing"

	"github.com/vddkcp/vddkcp/transfer/batch"
)

// FuzzLoad passes arbitrary bytes to Load. Each mistake that Load reports must have a
// place in the file, and the schema must accept each file that Load accepts.
func FuzzLoad(f *testing.F) {
	seeds, err := os.ReadDir("testdata/fuzz/FuzzLoad")
	if err != nil || len(seeds) < 10 {
		f.Fatalf("%d seeds, %v", len(seeds), err)
	}
	var schema map[string]any
	if err := json.Unmarshal(batch.Schema(testSpec()), &schema); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		file, err := batch.Load(bytes.NewReader(text), "f", "/d", testSpec())
		if err != nil {
			var bad *batch.FileError
			if !errors.As(err, &bad) || len(bad.Problems) == 0 {
				t.Fatalf("error %v", err)
			}
			lines := bytes.Split(text, []byte("\n"))
			for i, p := range bad.Problems {
				if p.Line < 1 || p.Line > len(lines) || p.Column < 1 || p.Column > len(lines[p.Line-1])+1 || p.Message == "" {
					t.Errorf("problem %+v of %q", p, text)
				}
				if i > 0 && (p.Line < bad.Problems[i-1].Line) {
					t.Errorf("%+v comes after %+v", p, bad.Problems[i-1])
				}
			}
			return
		}
		names := map[string]bool{}
		for i, j := range file.Jobs {
			if j.Index != i || names[j.Name] || j.Name == "" || j.Source == "" || j.Target == "" || j.HookTimeout <= 0 || j.Fingerprint() == "" {
				t.Errorf("job %+v", j)
			}
			names[j.Name] = true
		}
		var value any
		if err := json.Unmarshal(text, &value); err != nil {
			t.Fatalf("%v: %q", err, text)
		}
		if problem := validate(schema, schema, value, ""); problem != "" {
			t.Errorf("the schema refuses it: %s: %q", problem, text)
		}
	})
}
