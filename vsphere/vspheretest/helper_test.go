package vspheretest_test

import "fmt"

func dump(v any) string { return fmt.Sprintf("%q", fmt.Sprint(v)) }
