package sha1

import (
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"testing"
)

func TestNotAllowed(t *testing.T) {
	if os.Getenv("VDDKCP_TEST_SHA1") != "" {
		_, newErr := New()
		_, sumErr := Sum(nil)
		if !errors.As(newErr, new(*NotAllowedError)) || !errors.As(sumErr, new(*NotAllowedError)) {
			t.Errorf("%v, %v", newErr, sumErr)
		}
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestNotAllowed$")
	cmd.Env = append(os.Environ(), "VDDKCP_TEST_SHA1=1", "GODEBUG=fips140=only")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestSum(t *testing.T) {
	const want = "a9993e364706816aba3e25717850c26c9cd0d89d" // FIPS 180-4, "abc"
	sum, err := Sum([]byte("abc"))
	if got := hex.EncodeToString(sum[:]); got != want || err != nil {
		t.Errorf("%s, %v", got, err)
	}
	h, err := New()
	if err != nil {
		t.Fatal(err)
	}
	h.Write([]byte("abc"))
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		t.Error(got)
	}
}
