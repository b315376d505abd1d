package fileversion

import "testing"

func TestCheck(t *testing.T) {
	one := Format{Name: "state file", Oldest: 1, Newest: 1, Otherwise: "remove it"}
	two := Format{Name: "journal", Oldest: 2, Newest: 3, Otherwise: "use --force"}
	for _, c := range []struct {
		format     Format
		found      int64
		text, hint string // "": no error
	}{
		{one, 1, "", ""},
		{two, 2, "", ""},
		{two, 3, "", ""},
		{one, 2, "the state file has the format version 2, but this vddkcp reads only version 1", "use the newer vddkcp that wrote the file, or remove it"},
		{one, 0, "the state file has the format version 0, but this vddkcp reads only version 1", "no vddkcp writes this version, so the file is damaged or of another program: remove it"},
		{two, 1, "the journal has the format version 1, but this vddkcp reads only the versions 2 to 3", "use the older vddkcp that wrote the file, or use --force"},
		{two, 1 << 40, "the journal has the format version 1099511627776, but this vddkcp reads only the versions 2 to 3", "use the newer vddkcp that wrote the file, or use --force"},
	} {
		err := c.format.Check(c.found)
		if c.text == "" {
			if err != nil {
				t.Errorf("version %d: %v", c.found, err)
			}
			continue
		}
		e, ok := err.(*Error)
		if !ok || e.Error() != c.text || e.Hint() != c.hint || e.ExitStatus() != 2 {
			t.Errorf("version %d: %v, want %q with the hint %q", c.found, err, c.text, c.hint)
		}
	}
}

func TestCheckJSON(t *testing.T) {
	f := Format{Name: "state file", Oldest: 1, Newest: 1}
	for text, refused := range map[string]bool{
		`{"version":1}`:             false,
		`{"version":2,"jobs":"no"}`: true,
		`{"version":0}`:             true,
		`{"jobs":[]}`:               false,
		`{"version":"2"}`:           false,
		`{`:                         false,
		`7`:                         false,
	} {
		if err := f.CheckJSON([]byte(text)); (err != nil) != refused {
			t.Errorf("%s: %v", text, err)
		}
	}
}
