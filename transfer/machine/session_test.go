package machine_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/transfer/machine"
)

// TestSessionOfKilledRun checks that the session of a run that was killed is ended by the next run, and
// that no other session is.
func TestSessionOfKilledRun(t *testing.T) {
	f, dir := newFake(t, 64*kib), t.TempDir()
	path := filepath.Join(dir, "web01.vddkcp.json")
	var ended []string
	spec := f.spec(dir)
	spec.EndSession = func(_ context.Context, key string) error {
		ended = append(ended, key)
		return nil
	}
	session := "one"
	spec.Session = func() string { return session }
	var alive []byte // the state file while the run is alive
	f.reading = func() error {
		text, err := os.ReadFile(path)
		alive = text
		return err
	}
	if _, err := machine.Run(t.Context(), spec); err != nil || len(ended) > 0 {
		t.Fatalf("ended sessions %q, error %v", ended, err)
	}
	if text, err := os.ReadFile(path); err != nil || !strings.Contains(string(alive), `"session": "one"`) || strings.Contains(string(text), "session") {
		t.Errorf("the state file was %s, and is %s at the end (%v)", alive, text, err)
	}
	f.reading = nil
	if err := os.WriteFile(path, alive, 0o600); err != nil { // as if the run had been killed
		t.Fatal(err)
	}
	session, spec.Resume, spec.Force = "two", true, true
	if _, err := machine.Plan(t.Context(), spec); err != nil || len(ended) > 0 {
		t.Errorf("Plan ended the sessions %q, error %v", ended, err)
	}
	if _, err := machine.Run(t.Context(), spec); err != nil || !slices.Equal(ended, []string{"one"}) {
		t.Errorf("ended sessions %q, error %v", ended, err)
	}
	f.check(dir)
}
