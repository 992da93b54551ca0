"""What derivatives at the present weights say: curvature, gradient noise, Fisher matrix, metric."""
