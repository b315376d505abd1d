package usage_test

import (
	"errors"
	"io/fs"
	"testing"

	"github.com/vddkcp/vddkcp/internal/usage"
)

func TestError(t *testing.T) {
	hinted := usage.New("the address is wrong", "write another one")
	for _, c := range []struct {
		err        error
		text, hint string
		is         error
	}{
		{hinted, "the address is wrong", "write another one", nil},
		{usage.Errorf("file %q: %w", "x", fs.ErrNotExist), `file "x": file does not exist`, "", fs.ErrNotExist},
		{usage.Wrap(fs.ErrExist), "file already exists", "", fs.ErrExist},
		{usage.Wrap(errors.Join(hinted)), "the address is wrong", "write another one", nil},
	} {
		var e *usage.Error
		if !errors.As(c.err, &e) || e.Error() != c.text || e.Hint() != c.hint || e.ExitStatus() != 2 || c.is != nil && !errors.Is(c.err, c.is) {
			t.Errorf("%v, hint %q; want %q, %q", c.err, e.Hint(), c.text, c.hint)
		}
	}
}
